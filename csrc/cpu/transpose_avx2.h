// 16 rows of 32-bit words to columns; include only below a `#pragma GCC target` that has avx2.
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

}  // namespace
}  // namespace tcompress::cpu
