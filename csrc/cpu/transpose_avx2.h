// Rows of integers to the layouts of attention.h; include only below a `#pragma GCC target` that has avx2.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace tcompress::cpu {
namespace {

// Eight rows x eight words: row i of the result goes to out + 16 * i.
inline void transpose_8x8(const int32_t* rows, int64_t stride, int32_t* out) {
  __m256i a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + i * stride));
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * 16), _mm256_permute2x128_si256(a[i], a[i + 4], 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (i + 4) * 16),
                        _mm256_permute2x128_si256(a[i], a[i + 4], 0x31));
  }
}

// rows [16][stride words] -> out [words][16]. Rows are readable up to a multiple of eight words.
inline void transpose_words(const int32_t* rows, int64_t stride, int64_t words, int32_t* out) {
  int64_t w = 0;
  for (; w + 8 <= words; w += 8) {
    transpose_8x8(rows + w, stride, out + w * 16);
    transpose_8x8(rows + 8 * stride + w, stride, out + w * 16 + 8);
  }
  for (; w < words; ++w)
    for (int t = 0; t < 16; ++t) out[w * 16 + t] = rows[t * stride + w];
}

inline __m128i load_16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline void store_16(void* p, int index, __m128i a) { _mm_storeu_si128(static_cast<__m128i*>(p) + index, a); }

// 16 channels of two rows side by side.
inline void interleave(const int16_t* rows, int64_t stride, int16_t* out) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m128i a = load_16(rows + half * 8), b = load_16(rows + stride + half * 8);
    store_16(out, half * 2, _mm_unpacklo_epi16(a, b));
    store_16(out, half * 2 + 1, _mm_unpackhi_epi16(a, b));
  }
}

// 16 channels of four rows side by side.
inline void interleave(const int8_t* rows, int64_t stride, int8_t* out) {
  const __m128i a = load_16(rows), b = load_16(rows + stride);
  const __m128i c = load_16(rows + 2 * stride), d = load_16(rows + 3 * stride);
  const __m128i ab = _mm_unpacklo_epi8(a, b), cd = _mm_unpacklo_epi8(c, d);
  store_16(out, 0, _mm_unpacklo_epi16(ab, cd));
  store_16(out, 1, _mm_unpackhi_epi16(ab, cd));
  const __m128i ab_high = _mm_unpackhi_epi8(a, b), cd_high = _mm_unpackhi_epi8(c, d);
  store_16(out, 2, _mm_unpacklo_epi16(ab_high, cd_high));
  store_16(out, 3, _mm_unpackhi_epi16(ab_high, cd_high));
}

}  // namespace
}  // namespace tcompress::cpu
