// AVX-VNNI: vpdpbusd in its VEX form, for processors that have it without AVX-512. It adds four u8 * s8 products to a
// 32-bit lane, exact for every operand, 32 MAC an instruction and two a cycle. It wants unsigned activations: symmetric
// ones are stored with an offset of 128, which the epilogue takes out as a zero point.
//
// A sum takes 5 cycles and two start in each, so at least 10 should be under way; 16 registers hold 12 beside a
// broadcast of activations and weights. A single row has six, enough for weights that come from the second-level cache;
// more would mean splitting K, and GCC 12 spills.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avxvnni")

#include <immintrin.h>

#include "epilogue.h"
#include "int8_linear.h"
#include "int8_panel_tile.h"
#include "vec_avx2.h"

namespace tcompress::cpu {
namespace {

constexpr int kMaxRows = 5 * kTileRows;
static_assert(kMaxRows <= kMaxTileRows);
constexpr int kOutputs = 8;                  // of a ymm
constexpr int kColumns = kPanel / kOutputs;  // ymm of a panel
static_assert(kOutputs * kQuad == sizeof(__m256i));

template <int kRows, int kPanels>
void tile(const PanelTileArgs& args) {
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

constexpr PanelTiles kTiles = {
    tile<4, 1>, tile<5, 1>, tile<6, 1>, {{tile<1, 1>, tile<1, 2>, tile<1, 3>}, {tile<2, 1>, tile<2, 2>, tile<2, 3>}}};

void tile_any(const Int8TileArgs& args) { run_panel_tiles(args, kTiles); }

}  // namespace

const Int8LinearPath kInt8LinearAvxVnni = {kMaxRows, kTileRows,        50, 0, 0x80, quantize_row_avx2, tile_any,
                                           tile_any, epilogue_for<Vec>};

}  // namespace tcompress::cpu

#endif  // __x86_64__
