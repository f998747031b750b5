// Turns a matrix of 32-bit units; include only below a `#pragma GCC target` that has avx2.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace tcompress::cpu {
namespace {

// Eight rows and eight columns.
inline void transpose_8x8(const uint32_t* in, int64_t in_stride, uint32_t* out, int64_t out_stride) {
  __m256i a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i * in_stride));
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
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * out_stride),
                        _mm256_permute2x128_si256(a[i], a[i + 4], 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (i + 4) * out_stride),
                        _mm256_permute2x128_si256(a[i], a[i + 4], 0x31));
  }
}

// in [rows][in_stride] -> out [columns][out_stride]; rows and columns are multiples of eight.
inline void transpose_units(const uint32_t* in, int64_t in_stride, int64_t rows, int64_t columns, uint32_t* out,
                            int64_t out_stride) {
  for (int64_t c = 0; c < columns; c += 8)
    for (int64_t r = 0; r < rows; r += 8)
      transpose_8x8(in + r * in_stride + c, in_stride, out + c * out_stride + r, out_stride);
}

}  // namespace
}  // namespace tcompress::cpu
