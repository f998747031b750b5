// AVX2 tiles of the int4 layer with quantized activations: vpmaddubsw multiplies the weights, unsigned 0 … 15, by
// signed activations and adds neighbours in 16 bits.
//
// A span is 8 steps. A 16-bit lane then holds at most 8 * 2 * 15 * 127 = 30480 < 32768, at every partial sum too when
// it starts from zero; with the correction for the weights' zero (at most 8 * 2 * 127 * 15 = 30480 the other way) a
// partial sum may wrap, but the whole, |sum (w - zero) a| <= 30480, is exact modulo 2^16. Per span: vpmaddwd by ones,
// to float32, times the scale.
//
// Include below `#pragma GCC target("avx2,fma,f16c")`.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "int4_linear.h"
#include "vec_avx2.h"

namespace tcompress::cpu {
namespace {

constexpr int kSpanSteps = 8;
constexpr int kHalf = 32;                        // bytes of one ymm: 8 outputs x 4 k's
constexpr int kHalves = kPanel * kQuad / kHalf;  // of a panel
constexpr int kLanes = Vec::kLanes;
static_assert(kSpanSteps * 2 * 15 * 127 <= 32767);

inline __m256i load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline __m256i broadcast_word(const void* p) {
  int32_t word;
  __builtin_memcpy(&word, p, sizeof(word));
  return _mm256_set1_epi32(word);
}

// A word a span: the sums of the even and of the odd pairs of k's, in 16 bits each.
void corrections(const int8_t* a, int64_t steps, int64_t, bool has_zero_points, int32_t* out) {
  const int factor = has_zero_points ? -1 : -kSymmetricZero;
  for (int64_t step = 0; step < steps; step += kSpanSteps, ++out) {
    // 16 pair sums; even ones from the first two k's of each quad.
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), load_bytes(a + step * kQuad));
    __m128i sum = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    sum = _mm_add_epi16(sum, _mm_unpackhi_epi64(sum, sum));
    sum = _mm_add_epi16(sum, _mm_srli_epi64(sum, 32));
    *out = _mm_cvtsi128_si32(_mm_mullo_epi16(sum, _mm_set1_epi16(static_cast<int16_t>(factor))));
  }
}

// The start of 8 outputs' sums.
inline __m256i start(__m256i correction, const uint8_t* zero_points, int first) {
  if (zero_points == nullptr) return correction;
  const __m256i zeros = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zero_points + first)));
  return _mm256_mullo_epi16(correction, _mm256_or_si256(zeros, _mm256_slli_epi32(zeros, 16)));
}

template <class Scale>
inline void add_scaled(__m256i sum16, const Scale* scale, float* acc) {
  const __m256 sum = _mm256_cvtepi32_ps(_mm256_madd_epi16(sum16, _mm256_set1_epi16(1)));
  _mm256_storeu_ps(acc, _mm256_fmadd_ps(sum, Vec::load(scale).v, _mm256_loadu_ps(acc)));
}

// One span of kRows rows and one panel.
template <int kRows, bool kPacked, class Scale>
inline void span_panel(const int8_t* a, int64_t a_stride, const uint8_t* w, int64_t step_bytes,
                       const int32_t* correction, int64_t correction_stride, const Scale* scales,
                       const uint8_t* zero_points, float* acc, int64_t acc_stride) {
  const __m256i low = _mm256_set1_epi8(15);
  __m256i sum[kRows][kHalves];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int h = 0; h < kHalves; ++h)
      sum[r][h] = start(broadcast_word(correction + r * correction_stride), zero_points, h * kLanes);
#pragma GCC unroll 4
  for (int i = 0; i < kSpanSteps; i += 2) {
    __m256i first[kHalves], second[kHalves];
#pragma GCC unroll 2
    for (int h = 0; h < kHalves; ++h) {
      if constexpr (kPacked) {
        const __m256i both = load_bytes(w + h * kHalf);
        first[h] = _mm256_and_si256(both, low);
        second[h] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
      } else {
        first[h] = load_bytes(w + h * kHalf);
        second[h] = load_bytes(w + step_bytes + h * kHalf);
      }
    }
    w += kPacked ? step_bytes : 2 * step_bytes;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const int8_t* quads = a + r * a_stride + i * kQuad;
      const __m256i a0 = broadcast_word(quads), a1 = broadcast_word(quads + kQuad);
#pragma GCC unroll 2
      for (int h = 0; h < kHalves; ++h) {
        sum[r][h] = _mm256_add_epi16(sum[r][h], _mm256_maddubs_epi16(first[h], a0));
        sum[r][h] = _mm256_add_epi16(sum[r][h], _mm256_maddubs_epi16(second[h], a1));
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int h = 0; h < kHalves; ++h) add_scaled(sum[r][h], scales + h * kLanes, acc + r * acc_stride + h * kLanes);
}

template <int kRows, bool kPacked, class Scale>
void tile(const Int4TileArgs& args, int r0) {
  const int8_t* a = static_cast<const int8_t*>(args.a) + r0 * args.a_stride;
  const uint8_t* w = static_cast<const uint8_t*>(args.weights);
  const int width = args.n_panels * kPanel;
  const int64_t step_bytes = width * kQuad, span_bytes = step_bytes * kSpanSteps / (kPacked ? 2 : 1);
  float* acc = args.acc + r0 * width;
  const int32_t* correction = args.corrections + r0 * args.correction_stride;
  for (int p = 0; p < args.n_panels; ++p) {
    const Scale* scales = static_cast<const Scale*>(args.scales) + p * kPanel;
    const uint8_t* zero_points = args.zero_points == nullptr ? nullptr : args.zero_points + p * kPanel;
    int64_t in_group = 0;
    for (int64_t span = 0; span * kSpanSteps < args.steps; ++span) {
      span_panel<kRows, kPacked>(a + span * kSpanSteps * kQuad, args.a_stride,
                                 w + span * span_bytes + p * kPanel * kQuad, step_bytes, correction + span,
                                 args.correction_stride, scales, zero_points, acc + p * kPanel, width);
      if (++in_group == args.spans_per_group) {
        in_group = 0;
        scales += width;
        if (zero_points != nullptr) zero_points += width;
      }
    }
  }
}

void unpack(const Int4ChunkArgs& args) {
  const int64_t pair_bytes = args.n_panels * kPanel * kQuad;
  const __m256i low = _mm256_set1_epi8(15);
  uint8_t* out = static_cast<uint8_t*>(args.out);
  for (int64_t i = 0; i < args.steps / 2; ++i, out += 2 * pair_bytes)
    for (int64_t j = 0; j < pair_bytes; j += kHalf) {
      const __m256i both = load_bytes(args.weights + i * pair_bytes + j);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j), _mm256_and_si256(both, low));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + pair_bytes + j),
                          _mm256_and_si256(_mm256_srli_epi16(both, 4), low));
    }
}

}  // namespace
}  // namespace tcompress::cpu
