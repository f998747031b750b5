// AVX-VNNI: vpdpbusd in its VEX form, for processors that have it without AVX-512. It adds four u8 * s8 products to a
// 32-bit lane, exact for every operand, 32 MAC an instruction and two a cycle. It wants unsigned activations: symmetric
// ones are stored with an offset of 128, which the epilogue takes out as a zero point.
//
// A sum takes 5 cycles and two start in each, so at least 10 should be under way; 16 registers hold 12 beside a
// broadcast of activations and weights:
//
// 1. 6 (5, 4) rows x one panel, panel after panel.
// 2. Up to 3 rows, or what is left of them: 2 rows x the panels of a group together. A single row has six sums under
//    way, enough for weights that come from the second-level cache; more by splitting K, and GCC 12 spills.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avxvnni")

#include <immintrin.h>

#include "epilogue.h"
#include "int8_linear.h"
#include "vec_avx2.h"

namespace tcompress::cpu {
namespace {

constexpr int kTileRows = 6, kWideRows = 2;
constexpr int kMaxRows = 5 * kTileRows;
static_assert(kMaxRows <= kMaxTileRows);
constexpr int kOutputs = 8;                  // of a ymm
constexpr int kColumns = kPanel / kOutputs;  // ymm of a panel
constexpr int kPanelQuad = kPanel * kQuad;
static_assert(kOutputs * kQuad == sizeof(__m256i));

struct PanelsTileArgs {
  const uint8_t* a;
  int64_t a_stride;
  const int8_t* weights;  // the first panel's part of the group's first step
  int64_t step_bytes;
  int64_t steps;
  int32_t* acc;
  int64_t acc_stride;
};

template <int kRows, int kPanels>
void tile(const PanelsTileArgs& args) {
  constexpr int kWidth = kPanels * kColumns;
  __m256i sum[kRows][kWidth];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 6
    for (int c = 0; c < kWidth; ++c) sum[r][c] = _mm256_setzero_si256();

  const int8_t* weights = args.weights;
  for (int64_t i = 0; i < args.steps; ++i, weights += args.step_bytes) {
    const __m256i* w = reinterpret_cast<const __m256i*>(weights);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      int32_t quad;
      __builtin_memcpy(&quad, args.a + r * args.a_stride + i * kQuad, sizeof(quad));
      const __m256i a = _mm256_set1_epi32(quad);
#pragma GCC unroll 6
      for (int c = 0; c < kWidth; ++c) sum[r][c] = _mm256_dpbusd_avx_epi32(sum[r][c], a, _mm256_loadu_si256(w + c));
    }
  }

#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 6
    for (int c = 0; c < kWidth; ++c)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(args.acc + r * args.acc_stride + c * kOutputs), sum[r][c]);
}

using Tile = void (*)(const PanelsTileArgs&);
constexpr Tile kWide[kWideRows][kGroupPanels] = {{tile<1, 1>, tile<1, 2>, tile<1, 3>},
                                                 {tile<2, 1>, tile<2, 2>, tile<2, 3>}};

void tile_any(const Int8TileArgs& args) {
  const int64_t step_bytes = args.n_panels * kPanelQuad, acc_stride = args.n_panels * kPanel;
  const auto run = [&](Tile tile, int r, int p) {
    tile({args.a + r * args.a_stride, args.a_stride, args.weights + p * kPanelQuad, step_bytes, args.steps,
          args.acc + r * acc_stride + p * kPanel, acc_stride});
  };
  const int left = args.rows % kTileRows;
  const Tile last = left == 4 ? tile<4, 1> : (left == 5 ? tile<5, 1> : nullptr);
  const int whole = args.rows - left;
  for (int p = 0; p < args.n_panels; ++p) {
    for (int r = 0; r < whole; r += kTileRows) run(tile<6, 1>, r, p);
    if (last != nullptr) run(last, whole, p);
  }
  if (last != nullptr) return;
  for (int r = whole; r < args.rows; r += kWideRows)
    run(kWide[args.rows - r < kWideRows ? 0 : kWideRows - 1][args.n_panels - 1], r, 0);
}

}  // namespace

const Int8LinearPath kInt8LinearAvxVnni = {kMaxRows,          kTileRows, 50,       0x80,
                                           quantize_row_avx2, tile_any,  tile_any, epilogue_for<Vec>};

}  // namespace tcompress::cpu

#endif  // __x86_64__
