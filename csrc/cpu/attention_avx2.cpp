// AVX2: 16-bit lanes throughout (attention_tile_avx2.h), so 12 bits cost what 8 do.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")

#include <immintrin.h>

#include "attention.h"
#include "attention_softmax.h"
#include "attention_tile_avx2.h"
#include "transpose_avx2.h"
#include "vec_avx2.h"

namespace tcompress::cpu {
namespace {

struct Shorts {
  static constexpr int kVecs = 2, kLanes = 16;
  __m256i v;

  static Shorts from_ticks(const Vec* ticks) {
    // Below 16 bits saturates to -32768; a float that does not fit 32 bits, or NaN, becomes the lowest integer first.
    const __m256i both = _mm256_packs_epi32(_mm256_cvtps_epi32(ticks[0].v), _mm256_cvtps_epi32(ticks[1].v));
    return {_mm256_permute4x64_epi64(both, 0xd8)};
  }
  static Shorts load(const int16_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
  static Shorts set1(int16_t x) { return {_mm256_set1_epi16(x)}; }
};

inline Shorts operator+(Shorts a, Shorts b) { return {_mm256_add_epi16(a.v, b.v)}; }
inline Shorts mul_high(Shorts a, Shorts b) { return {_mm256_mulhrs_epi16(a.v, b.v)}; }
inline Shorts fraction(Shorts a) { return {_mm256_and_si256(_mm256_slli_epi16(a.v, 4), _mm256_set1_epi16(0x7ff0))}; }
// 2^(14 + n) from two tables of bytes, by the low four bits of n = 0, -15 … -1. Lower n's are made -15 first, which has
// 0. In each lane the upper byte of the index is 0: it picks 0 for the low half, and is shifted out of the high one.
inline Shorts power(Shorts ticks) {
  const __m256i low = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 1, 2, 4, 8, 16, 32, 64, -128, 0, 0, 0, 0, 0, 0));
  const __m256i high = _mm256_broadcastsi128_si256(_mm_setr_epi8(64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 4, 8, 16, 32));
  const __m256i clamped = _mm256_max_epi16(ticks.v, _mm256_set1_epi16(-15 * 2048));
  const __m256i index = _mm256_srli_epi16(clamped, 11);
  return {_mm256_or_si256(_mm256_shuffle_epi8(low, index), _mm256_slli_epi16(_mm256_shuffle_epi8(high, index), 8))};
}
inline int32_t sum(const Shorts (&p)[4]) {
  const __m256i ones = _mm256_set1_epi16(1);
  const __m256i pairs =
      _mm256_add_epi32(_mm256_madd_epi16(_mm256_add_epi16(p[0].v, p[1].v), ones),  // at most 16384: no overflow
                       _mm256_madd_epi16(_mm256_add_epi16(p[2].v, p[3].v), ones));
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

inline void store_sums(float* out, const Vec (&x)[4]) {
  const __m256 d = _mm256_hadd_ps(_mm256_hadd_ps(x[0].v, x[1].v), _mm256_hadd_ps(x[2].v, x[3].v));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1)));
}

inline Vec from_integers(const int32_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline __m128i to_shorts(Vec a) {
  const __m256i i = _mm256_cvtps_epi32(a.v);
  return _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
}
inline void store_integers(int16_t* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_shorts(a)); }
inline void store_integers(int8_t* p, Vec a) {
  const __m128i s = to_shorts(a);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(s, s));
}

inline __m256i magnitude(Vec a) { return _mm256_and_si256(_mm256_castps_si256(a.v), _mm256_set1_epi32(0x7fffffff)); }
inline __m256i larger(__m256i a, __m256i b) { return _mm256_max_epi32(a, b); }
inline uint32_t largest_lane(__m256i a) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1))));
}

template <bool kWide>
struct Tiles {
  using Query = int16_t;
  static constexpr int kIntegerBytes = kWide ? 2 : 1;  // of a key or value
  static constexpr int kRun = 4 / kIntegerBytes;

  static int32_t sum_of(const Query*, int64_t) { return 0; }

  static void multiply(const int16_t* a, int64_t stride, int rows, const char* panel, int64_t steps, int32_t* sums) {
    if constexpr (kWide) {
      tile_wide(a, stride, panel, steps, sums);  // the rows past the last one are zeros
    } else {
      tile_narrow(a, stride, rows, panel, steps, sums);
    }
  }

  static void scores(const Query* q, int64_t stride, const int32_t*, int rows, const void* keys, int64_t dk, int panels,
                     int32_t* s) {
    for (int p = 0; p < panels; ++p)
      multiply(q, stride, rows, static_cast<const char*>(keys) + p * kTokenPanel * dk * kIntegerBytes, dk / kRun,
               s + p * kTokenPanel);
  }

  static void store_weights(const Shorts (&p)[4], void* row) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm256_storeu_si256(static_cast<__m256i*>(row) + i, p[i].v);
  }

  static void values(const void* weights, int rows, const void* values, int token_panels, int64_t dv,
                     const float* factor, float* out) {
    alignas(32) int32_t sums[kQueryTile * kSumStride];
    for (int64_t c = 0; c < dv; c += kChannelPanel) {
      const char* panel = static_cast<const char*>(values) + c * kKeyBlock * kIntegerBytes;
      multiply(static_cast<const int16_t*>(weights), kKeyBlock, rows, panel, token_panels * kTokenPanel / kRun, sums);
      for (int r = 0; r < rows; ++r) {
        const __m256 f = _mm256_set1_ps(factor[r]);
#pragma GCC unroll 2
        for (int i = 0; i < kChannelPanel; i += 8) {
          float* o = out + r * dv + c + i;
          const __m256i s = _mm256_load_si256(reinterpret_cast<const __m256i*>(sums + r * kSumStride + i));
          _mm256_storeu_ps(o, _mm256_add_ps(_mm256_loadu_ps(o), _mm256_mul_ps(_mm256_cvtepi32_ps(s), f)));
        }
      }
    }
  }
};

}  // namespace
}  // namespace tcompress::cpu

#include "attention_pack.h"
#include "attention_rows.h"
#include "short_attention_rows.h"

namespace tcompress::cpu {

const AttentionPath kAttentionAvx2 = {/*narrow_prefill=*/false,
                                      attend<Vec, Shorts, Tiles<true>, true>,
                                      attend<Vec, Shorts, Tiles<false>, false>,
                                      combine<Vec>,
                                      key_mean<Vec>,
                                      pack<Vec>,
                                      short_rows<Vec, 2>};

}  // namespace tcompress::cpu

#endif  // __x86_64__
