// AVX-512 VNNI: vpdpbusd multiplies the weights, unsigned 0 … 15, by signed activations, 64 MAC an instruction. What is
// left, the weights' zero, is a correction by the sum of the activations: the sums start from it, at no cost in the
// loop.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

#include <immintrin.h>

#include "epilogue.h"
#include "int4_linear.h"
#include "int4_tile_avx512.h"
#include "to_float.h"
#include "vec_avx512.h"

namespace tcompress::cpu {
namespace {

constexpr int kIntRows = 4;  // 4 rows x 3 panels, in integers and in floats, + 3 weights + 1 activation = 28 registers
constexpr int kMaxRows = kFloatRows;
constexpr int64_t kMaxSpanSteps = 128;
constexpr int64_t kPrefetchBytes = 1536;  // one token waits for its weights: 4 to 7 % less time than without

void corrections(const int8_t* a, int64_t steps, int64_t span_steps, bool has_zero_points, int32_t* out) {
  const int32_t factor = has_zero_points ? -1 : -kSymmetricZero;
  const __m256i ones = _mm256_set1_epi8(1);
  for (int64_t step = 0; step < steps; step += span_steps, ++out) {
    const int64_t end = step + span_steps < steps ? step + span_steps : steps;
    __m256i sum = _mm256_setzero_si256();
    for (int64_t i = step; i < end; i += 8)  // a multiple of 8 steps: 32 bytes
      sum = _mm256_dpbusd_epi32(sum, ones, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + i * kQuad)));
    const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    const __m128i quarter = _mm_add_epi32(half, _mm_unpackhi_epi64(half, half));
    *out = (_mm_cvtsi128_si32(quarter) + _mm_extract_epi32(quarter, 1)) * factor;
  }
}

// The low nibbles are the first step of a pair, the high ones the second.
template <int kPanels, bool kPacked>
inline void load_pair(const uint8_t* w, __m512i (&first)[kPanels], __m512i (&second)[kPanels]) {
  const __m512i low = _mm512_set1_epi8(15);
#pragma GCC unroll 3
  for (int p = 0; p < kPanels; ++p) {
    if constexpr (kPacked) {
      const __m512i both = _mm512_loadu_si512(w + p * kPanelQuad);
      first[p] = _mm512_and_si512(both, low);
      second[p] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
    } else {
      first[p] = _mm512_loadu_si512(w + p * kPanelQuad);
      second[p] = _mm512_loadu_si512(w + (kPanels + p) * kPanelQuad);
    }
  }
}

inline __m512i broadcast_quad(const int8_t* a) {
  int32_t quad;
  __builtin_memcpy(&quad, a, sizeof(quad));
  return _mm512_set1_epi32(quad);
}

template <int kRows, int kPanels, bool kPacked, class Scale>
void tile(const Int4TileArgs& args, int r0) {
  // A sum takes 5 cycles and two start in each: small tiles sum the two steps of a pair apart.
  constexpr int kSplits = kRows * kPanels >= 10 ? 1 : 2;
  constexpr int64_t kPairBytes = kPanels * kPanelQuad * (kPacked ? 1 : 2);
  const int8_t* a = static_cast<const int8_t*>(args.a) + r0 * args.a_stride;
  const uint8_t* w = static_cast<const uint8_t*>(args.weights);
  const Scale* scales = static_cast<const Scale*>(args.scales);
  const uint8_t* zero_points = args.zero_points;
  float* acc = args.acc + r0 * kPanels * kPanel;

  __m512 total[kRows][kPanels];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int p = 0; p < kPanels; ++p) total[r][p] = _mm512_loadu_ps(acc + (r * kPanels + p) * kPanel);

  int64_t in_group = 0;
  for (int64_t step = 0, span = 0; step < args.steps; step += args.span_steps, ++span) {
    const int64_t pairs = (args.steps - step < args.span_steps ? args.steps - step : args.span_steps) / 2;
    __m512i sum[kSplits][kRows][kPanels];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m512i correction = _mm512_set1_epi32(args.corrections[(r0 + r) * args.correction_stride + span]);
#pragma GCC unroll 3
      for (int p = 0; p < kPanels; ++p) {
        sum[0][r][p] = correction;
        if (zero_points != nullptr) {
          const __m128i zeros = _mm_loadu_si128(reinterpret_cast<const __m128i*>(zero_points + p * kPanel));
          sum[0][r][p] = _mm512_mullo_epi32(correction, _mm512_cvtepu8_epi32(zeros));
        }
        if constexpr (kSplits == 2) sum[1][r][p] = _mm512_setzero_si512();
      }
    }
    for (int64_t i = 0; i < pairs; ++i, w += kPairBytes) {
      __m512i first[kPanels], second[kPanels];
      load_pair<kPanels, kPacked>(w, first, second);
      if constexpr (kPacked && kRows == 1)
#pragma GCC unroll 3
        for (int p = 0; p < kPanels; ++p) _mm_prefetch(w + kPrefetchBytes + p * kPanelQuad, _MM_HINT_T0);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const int8_t* quads = a + r * args.a_stride + (step + 2 * i) * kQuad;
        const __m512i a0 = broadcast_quad(quads), a1 = broadcast_quad(quads + kQuad);
#pragma GCC unroll 3
        for (int p = 0; p < kPanels; ++p) sum[0][r][p] = _mm512_dpbusd_epi32(sum[0][r][p], first[p], a0);
#pragma GCC unroll 3
        for (int p = 0; p < kPanels; ++p)
          sum[kSplits - 1][r][p] = _mm512_dpbusd_epi32(sum[kSplits - 1][r][p], second[p], a1);
      }
    }
#pragma GCC unroll 3
    for (int p = 0; p < kPanels; ++p) {
      const __m512 scale = Vec::load(scales + p * kPanel).v;
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        __m512i s = sum[0][r][p];
        if constexpr (kSplits == 2) s = _mm512_add_epi32(s, sum[1][r][p]);
        total[r][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s), scale, total[r][p]);
      }
    }
    if (++in_group == args.spans_per_group) {
      in_group = 0;
      scales += kPanels * kPanel;
      if (zero_points != nullptr) zero_points += kPanels * kPanel;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int p = 0; p < kPanels; ++p) _mm512_storeu_ps(acc + (r * kPanels + p) * kPanel, total[r][p]);
}

template <bool kPacked, class Scale>
void tile_any(const Int4TileArgs& args) {
  using Tile = void (*)(const Int4TileArgs&, int);
#define TCOMPRESS_ROWS(r)                                                              \
  {                                                                                    \
    tile<r, 1, kPacked, Scale>, tile<r, 2, kPacked, Scale>, tile<r, 3, kPacked, Scale> \
  }
  static constexpr Tile kTiles[kIntRows][kGroupPanels] = {TCOMPRESS_ROWS(1), TCOMPRESS_ROWS(2), TCOMPRESS_ROWS(3),
                                                          TCOMPRESS_ROWS(4)};
#undef TCOMPRESS_ROWS
  for (int r = 0; r < args.rows; r += kIntRows) {
    const int rows = args.rows - r < kIntRows ? args.rows - r : kIntRows;
    kTiles[rows - 1][args.n_panels - 1](args, r);
  }
}

void unpack(const Int4ChunkArgs& args) {
  const int64_t pair_bytes = args.n_panels * kPanelQuad;
  const __m512i low = _mm512_set1_epi8(15);
  uint8_t* out = static_cast<uint8_t*>(args.out);
  for (int64_t i = 0; i < args.steps / 2; ++i, out += 2 * pair_bytes)
    for (int p = 0; p < args.n_panels; ++p) {
      const __m512i both = _mm512_loadu_si512(args.weights + i * pair_bytes + p * kPanelQuad);
      _mm512_storeu_si512(out + p * kPanelQuad, _mm512_and_si512(both, low));
      _mm512_storeu_si512(out + pair_bytes + p * kPanelQuad, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
    }
}

}  // namespace

const Int4LinearPath kInt4LinearAvx512Vnni = {kMaxRows,
                                              kIntRows,
                                              kIntRows,
                                              80,
                                              24,
                                              kMaxSpanSteps,
                                              quantize_row_avx512,
                                              corrections,
                                              {tile_any<true, float>, tile_any<true, Float16>},
                                              {tile_any<false, float>, tile_any<false, Float16>},
                                              {float_packed<float>, float_packed<Float16>},
                                              {float_unpacked<float>, float_unpacked<Float16>},
                                              unpack,
                                              float_unpack,
                                              row_to_float<Vec>,
                                              float_epilogue_for<Vec>};

}  // namespace tcompress::cpu

#endif  // __x86_64__
