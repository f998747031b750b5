// AVX-512 VNNI: vpdpbusd adds four u8 * s8 products to a 32-bit lane, exact for every operand (the form without
// saturation), 64 MAC an instruction and two a cycle. It wants unsigned activations: symmetric ones are stored with an
// offset of 128, which the epilogue takes out as a zero point.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

#include <immintrin.h>

#include "epilogue.h"
#include "int8_linear.h"
#include "vec_avx512.h"

namespace tcompress::cpu {
namespace {

constexpr int kMaxRows = 8;                 // 8 rows x 3 panels of sums + 3 weights + 1 broadcast = 28 of 32 registers
constexpr int kPanelQuad = kPanel * kQuad;  // 64 bytes: one zmm

// A sum takes 5 cycles and two start in each, so at least 10 must be under way: small tiles split K.
constexpr int k_splits(int sums) { return sums >= 10 ? 1 : (sums >= 5 ? 2 : 4); }

template <int kRows, int kPanels>
void tile(const Int8TileArgs& args) {
  constexpr int kSplits = k_splits(kRows * kPanels);
  __m512i sum[kSplits][kRows][kPanels];
#pragma GCC unroll 4
  for (int s = 0; s < kSplits; ++s)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
      for (int p = 0; p < kPanels; ++p) sum[s][r][p] = _mm512_setzero_si512();

  const auto step = [&](int64_t i, int s) __attribute__((always_inline)) {
    const int8_t* weights = args.weights + i * kPanels * kPanelQuad;
    __m512i w[kPanels];
#pragma GCC unroll 3
    for (int p = 0; p < kPanels; ++p) w[p] = _mm512_loadu_si512(weights + p * kPanelQuad);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      int32_t quad;
      __builtin_memcpy(&quad, args.a + r * args.a_stride + i * kQuad, sizeof(quad));
      const __m512i a = _mm512_set1_epi32(quad);
#pragma GCC unroll 3
      for (int p = 0; p < kPanels; ++p) sum[s][r][p] = _mm512_dpbusd_epi32(sum[s][r][p], a, w[p]);
    }
  };
  static_assert(kPanelQuad == sizeof(__m512i));

  const int64_t body = args.steps - args.steps % kSplits;
  for (int64_t i = 0; i < body; i += kSplits)
#pragma GCC unroll 4
    for (int s = 0; s < kSplits; ++s) step(i + s, s);
  for (int64_t i = body; i < args.steps; ++i) step(i, 0);

#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int p = 0; p < kPanels; ++p) {
      __m512i total = sum[0][r][p];
#pragma GCC unroll 4
      for (int s = 1; s < kSplits; ++s) total = _mm512_add_epi32(total, sum[s][r][p]);
      int32_t* acc = args.acc + (r * kPanels + p) * kPanel;
      if (args.accumulate) total = _mm512_add_epi32(total, _mm512_loadu_si512(acc));
      _mm512_storeu_si512(acc, total);
    }
}

#define TCOMPRESS_ROWS(r) {tile<r, 1>, tile<r, 2>, tile<r, 3>}
constexpr void (*kTiles[kMaxRows][kGroupPanels])(const Int8TileArgs&) = {
    TCOMPRESS_ROWS(1), TCOMPRESS_ROWS(2), TCOMPRESS_ROWS(3), TCOMPRESS_ROWS(4),
    TCOMPRESS_ROWS(5), TCOMPRESS_ROWS(6), TCOMPRESS_ROWS(7), TCOMPRESS_ROWS(8)};
#undef TCOMPRESS_ROWS

void tile_any(const Int8TileArgs& args) { kTiles[args.rows - 1][args.n_panels - 1](args); }

}  // namespace

const Int8LinearPath kInt8LinearAvx512Vnni = {kMaxRows, kMaxRows,         80, 0, 0x80, quantize_row_avx512, tile_any,
                                              tile_any, epilogue_for<Vec>};

}  // namespace tcompress::cpu

#endif  // __x86_64__
