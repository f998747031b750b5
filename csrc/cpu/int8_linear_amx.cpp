// AMX: tdpbusd multiplies a tile of 16 rows x 64 unsigned activations by one of 64 x 16 signed weights and adds to 16 x
// 16 sums in 32 bits: 16,384 MAC in 16 cycles, exact. Activations are unsigned as for AVX-512 VNNI (offset 128).
//
// The kernel layout is the tile's own: sixteen steps of a panel are 16 rows of 64 bytes, one step apart.
//
// 1. Up to 32 rows x 3 panels: six tiles of sums, one of activations, one of weights.
// 2. What is left of K after blocks of 64 is copied into zero-padded buffers.
// 3. Few rows go to the AVX-512 VNNI tile: a tile would be mostly empty.
//
// Rows beyond `rows` of the last 16 are read too: the caller's buffer has room for them (row_unit), what comes out of
// them is not used.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8")

#include <immintrin.h>

#include "amx_tiles.h"
#include "epilogue.h"
#include "int8_linear.h"
#include "vec_avx512.h"

namespace tcompress::cpu {
namespace {

constexpr int kMaxRows = 2 * kTileRows;
constexpr int kFewRows = 8;          // fewer rows than this: AVX-512 VNNI
constexpr int64_t kChunkSteps = 96;  // 96 * 192 bytes = 18 KB of weights, beside 12 KB of activations
static_assert(kMaxRows <= kMaxTileRows && kChunkSteps % kTileSteps == 0);

constexpr TileConfig kFullTiles(kTileRows, kTileSteps);

// Tile numbers are part of the instruction: sums 0 … 2 and 3 … 5, activations 6, weights 7.
#define TC_MULTIPLY_PANEL(sum, panel)                        \
  _tile_loadd(7, w + (panel) * kPanel * kQuad, step_stride); \
  _tile_dpbusd(sum, 6, 7);

template <int kPanels, bool kTwoTiles>
inline void multiply(const uint8_t* a, int64_t a_stride, const int8_t* w, int64_t step_stride) {
  _tile_loadd(6, a, a_stride);
  TC_MULTIPLY_PANEL(0, 0)
  if constexpr (kPanels > 1) {
    TC_MULTIPLY_PANEL(1, 1)
  }
  if constexpr (kPanels > 2) {
    TC_MULTIPLY_PANEL(2, 2)
  }
  if constexpr (kTwoTiles) {
    _tile_loadd(6, a + kTileRows * a_stride, a_stride);
    TC_MULTIPLY_PANEL(3, 0)
    if constexpr (kPanels > 1) {
      TC_MULTIPLY_PANEL(4, 1)
    }
    if constexpr (kPanels > 2) {
      TC_MULTIPLY_PANEL(5, 2)
    }
  }
}

#undef TC_MULTIPLY_PANEL

template <int kPanels, bool kTwoTiles>
void tile(const Int8TileArgs& args) {
  constexpr int64_t kStepStride = kPanels * kPanel * kQuad;
  _tile_loadconfig(&kFullTiles);
  constexpr int64_t kAccStride = kPanels * kPanel * sizeof(int32_t);
  int32_t* acc = args.acc;
  int32_t* second = acc + kTileRows * kPanels * kPanel;
  if (args.accumulate) {
    _tile_loadd(0, acc, kAccStride);
    if constexpr (kPanels > 1) _tile_loadd(1, acc + kPanel, kAccStride);
    if constexpr (kPanels > 2) _tile_loadd(2, acc + 2 * kPanel, kAccStride);
    if constexpr (kTwoTiles) {
      _tile_loadd(3, second, kAccStride);
      if constexpr (kPanels > 1) _tile_loadd(4, second + kPanel, kAccStride);
      if constexpr (kPanels > 2) _tile_loadd(5, second + 2 * kPanel, kAccStride);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
  }
  int64_t step = 0;
  for (; step + kTileSteps <= args.steps; step += kTileSteps) {
    multiply<kPanels, kTwoTiles>(args.a + step * kQuad, args.a_stride, args.weights + step * kStepStride, kStepStride);
  }
  if (step < args.steps) {
    alignas(64) uint8_t a[kMaxRows * kTileBytes] = {};
    alignas(64) int8_t w[kTileSteps * kStepStride] = {};
    const int64_t left = args.steps - step;
    for (int r = 0; r < args.rows; ++r)
      __builtin_memcpy(a + r * kTileBytes, args.a + r * args.a_stride + step * kQuad, left * kQuad);
    __builtin_memcpy(w, args.weights + step * kStepStride, left * kStepStride);
    multiply<kPanels, kTwoTiles>(a, kTileBytes, w, kStepStride);
  }
  _tile_stored(0, acc, kAccStride);
  if constexpr (kPanels > 1) _tile_stored(1, acc + kPanel, kAccStride);
  if constexpr (kPanels > 2) _tile_stored(2, acc + 2 * kPanel, kAccStride);
  if constexpr (kTwoTiles) {
    _tile_stored(3, second, kAccStride);
    if constexpr (kPanels > 1) _tile_stored(4, second + kPanel, kAccStride);
    if constexpr (kPanels > 2) _tile_stored(5, second + 2 * kPanel, kAccStride);
  }
  _tile_release();
}

using Tile = void (*)(const Int8TileArgs&);
constexpr Tile kTiles[2][kGroupPanels] = {{tile<1, false>, tile<2, false>, tile<3, false>},
                                          {tile<1, true>, tile<2, true>, tile<3, true>}};

void tile_any(const Int8TileArgs& args) {
  if (args.rows <= kFewRows) return kInt8LinearAvx512Vnni.tile_unsigned(args);
  kTiles[args.rows > kTileRows][args.n_panels - 1](args);
}

}  // namespace

const Int8LinearPath kInt8LinearAmx = {
    kMaxRows, kTileRows, 500, kChunkSteps, 0x80, quantize_row_avx512, tile_any, tile_any, epilogue_for<Vec>};

}  // namespace tcompress::cpu

#endif  // __x86_64__
