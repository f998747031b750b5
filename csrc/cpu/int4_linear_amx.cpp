// AMX: tdpbsud multiplies a tile of 16 rows x 64 signed activations by one of 64 x 16 unsigned weights, unpacked to a
// byte each, and adds to 16 x 16 sums in 32 bits (int8_linear_amx.cpp has the layout). Groups of 32 use tiles of half
// the depth. Few rows, and weight-only layers, go to AVX-512.
//
// Rows beyond `rows` of the last 16 are read too: the caller's buffer has room for them (row_unit). What lies beyond
// the last step, up to a whole tile, is multiplied by activations that are zero.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8")

#include <immintrin.h>

#include "amx_tiles.h"
#include "epilogue.h"
#include "int4_linear.h"
#include "to_float.h"
#include "vec_avx512.h"

namespace tcompress::cpu {
namespace {

constexpr int kMaxRows = 2 * kTileRows;
constexpr int kFewRows = 8;  // fewer rows than this: AVX-512
constexpr int64_t kMaxSpanSteps = 2 * kTileSteps;
static_assert(kMaxRows <= kMaxTileRows);

// Tile numbers are part of the instruction: sums 0 … 2 and 3 … 5, activations 6, weights 7.
#define TC_MULTIPLY_PANEL(sum, panel)                        \
  _tile_loadd(7, w + (panel) * kPanel * kQuad, step_stride); \
  _tile_dpbsud(sum, 6, 7);

template <int kPanels, bool kTwoTiles>
inline void multiply(const int8_t* a, int64_t a_stride, const uint8_t* w, int64_t step_stride) {
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

// Sums of a span to floats, times the scales.
template <int kPanels, class Scale>
inline void flush(const Int4TileArgs& args, const int32_t* sums, int64_t span, const Scale* scales,
                  const uint8_t* zero_points) {
  __m512 scale[kPanels];
  __m512i zeros[kPanels];
#pragma GCC unroll 3
  for (int p = 0; p < kPanels; ++p) {
    scale[p] = Vec::load(scales + p * kPanel).v;
    zeros[p] = _mm512_set1_epi32(1);
    if (zero_points != nullptr)
      zeros[p] = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zero_points + p * kPanel)));
  }
  for (int r = 0; r < args.rows; ++r) {
    const __m512i correction = _mm512_set1_epi32(args.corrections[r * args.correction_stride + span]);
#pragma GCC unroll 3
    for (int p = 0; p < kPanels; ++p) {
      const int at = (r * kPanels + p) * kPanel;
      const __m512i start = zero_points == nullptr ? correction : _mm512_mullo_epi32(correction, zeros[p]);
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_loadu_si512(sums + at), start));
      _mm512_storeu_ps(args.acc + at, _mm512_fmadd_ps(sum, scale[p], _mm512_loadu_ps(args.acc + at)));
    }
  }
}

template <int kPanels, bool kTwoTiles, class Scale>
void tile(const Int4TileArgs& args) {
  constexpr int64_t kStepStride = kPanels * kPanel * kQuad;
  constexpr int64_t kSumStride = kPanels * kPanel * sizeof(int32_t);
  alignas(64) int32_t sums[(kTwoTiles ? 2 : 1) * kTileRows * kPanels * kPanel];
  const int64_t depth = args.span_steps < kTileSteps ? args.span_steps : kTileSteps;
  const TileConfig config(kTileRows, static_cast<int>(depth));
  _tile_loadconfig(&config);
  const int8_t* a = static_cast<const int8_t*>(args.a);
  const uint8_t* w = static_cast<const uint8_t*>(args.weights);
  const Scale* scales = static_cast<const Scale*>(args.scales);
  const uint8_t* zero_points = args.zero_points;
  int64_t in_group = 0;
  for (int64_t step = 0, span = 0; step < args.steps; step += args.span_steps, ++span) {
    const int64_t end = args.steps - step < args.span_steps ? args.steps : step + args.span_steps;
    _tile_zero(0);
    if constexpr (kPanels > 1) _tile_zero(1);
    if constexpr (kPanels > 2) _tile_zero(2);
    if constexpr (kTwoTiles) {
      _tile_zero(3);
      if constexpr (kPanels > 1) _tile_zero(4);
      if constexpr (kPanels > 2) _tile_zero(5);
    }
    for (int64_t s = step; s < end; s += depth)
      multiply<kPanels, kTwoTiles>(a + s * kQuad, args.a_stride, w + s * kStepStride, kStepStride);
    _tile_stored(0, sums, kSumStride);
    if constexpr (kPanels > 1) _tile_stored(1, sums + kPanel, kSumStride);
    if constexpr (kPanels > 2) _tile_stored(2, sums + 2 * kPanel, kSumStride);
    if constexpr (kTwoTiles) {
      int32_t* second = sums + kTileRows * kPanels * kPanel;
      _tile_stored(3, second, kSumStride);
      if constexpr (kPanels > 1) _tile_stored(4, second + kPanel, kSumStride);
      if constexpr (kPanels > 2) _tile_stored(5, second + 2 * kPanel, kSumStride);
    }
    flush<kPanels>(args, sums, span, scales, zero_points);
    if (++in_group == args.spans_per_group) {
      in_group = 0;
      scales += kPanels * kPanel;
      if (zero_points != nullptr) zero_points += kPanels * kPanel;
    }
  }
  _tile_release();
}

template <class Scale>
void unpacked(const Int4TileArgs& args) {
  if (args.rows <= kFewRows) return kInt4LinearAvx512Vnni.unpacked[sizeof(Scale) == sizeof(Float16)](args);
  static constexpr Int4Tile kTiles[2][kGroupPanels] = {
      {tile<1, false, Scale>, tile<2, false, Scale>, tile<3, false, Scale>},
      {tile<1, true, Scale>, tile<2, true, Scale>, tile<3, true, Scale>}};
  kTiles[args.rows > kTileRows][args.n_panels - 1](args);
}

// The caller passes up to 32 rows.
template <class Scale>
void float_unpacked(const Int4TileArgs& args) {
  constexpr int kRows = 8;
  Int4TileArgs part = args;
  for (int r = 0; r < args.rows; r += kRows) {
    part.rows = args.rows - r < kRows ? args.rows - r : kRows;
    part.a = static_cast<const char*>(args.a) + r * args.a_stride;
    part.acc = args.acc + r * args.n_panels * kPanel;
    kInt4LinearAvx512Vnni.float_unpacked[sizeof(Scale) == sizeof(Float16)](part);
  }
}

void corrections(const int8_t* a, int64_t steps, int64_t span_steps, bool has_zero_points, int32_t* out) {
  kInt4LinearAvx512Vnni.corrections(a, steps, span_steps, has_zero_points, out);
}

template <class Scale>
void packed(const Int4TileArgs& args) {
  kInt4LinearAvx512Vnni.packed[sizeof(Scale) == sizeof(Float16)](args);
}

template <class Scale>
void float_packed(const Int4TileArgs& args) {
  kInt4LinearAvx512Vnni.float_packed[sizeof(Scale) == sizeof(Float16)](args);
}

void unpack(const Int4ChunkArgs& args) { kInt4LinearAvx512Vnni.unpack(args); }
void float_unpack(const Int4ChunkArgs& args) { kInt4LinearAvx512Vnni.float_unpack(args); }

}  // namespace

const Int4LinearPath kInt4LinearAmx = {kMaxRows,
                                       4,
                                       kTileRows,
                                       300,
                                       24,
                                       kMaxSpanSteps,
                                       quantize_row_avx512,
                                       corrections,
                                       {packed<float>, packed<Float16>},
                                       {unpacked<float>, unpacked<Float16>},
                                       {float_packed<float>, float_packed<Float16>},
                                       {float_unpacked<float>, float_unpacked<Float16>},
                                       unpack,
                                       float_unpack,
                                       row_to_float<Vec>,
                                       float_epilogue_for<Vec>};

}  // namespace tcompress::cpu

#endif  // __x86_64__
