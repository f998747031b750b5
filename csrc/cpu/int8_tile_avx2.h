// AVX2 register tiles over one panel of 16 outputs that widen to 32 bits at every step. Include only below
// `#pragma GCC target("avx2")`; everything is in an anonymous namespace.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "int8_linear.h"
#include "int8_panel_tile.h"

namespace tcompress::cpu {
namespace {

constexpr int kHalf = 32;  // bytes of one ymm: 8 outputs x 4 k's

inline __m256i broadcast_quad(const uint8_t* a) {
  int32_t quad;
  __builtin_memcpy(&quad, a, sizeof(quad));
  return _mm256_set1_epi32(quad);
}

// maddubs with the weight taken from memory. As an intrinsic, GCC 12 loads it to a 17th register and spills a sum.
inline __m256i maddubs_from_memory(__m256i a, const int8_t* w) {
  __m256i product;
  asm("vpmaddubsw %2, %1, %0" : "=x"(product) : "x"(a), "m"(*reinterpret_cast<const __m256i_u*>(w)));
  return product;
}

template <int kRows>
inline void store_sums(const PanelTileArgs& args, const __m256i (&sum)[kRows][2]) {
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    int32_t* acc = args.acc + r * args.acc_stride;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc), sum[r][0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + kPanel / 2), sum[r][1]);
  }
}

// At most 6 rows: 12 sums + 1 weight + broadcast + product + ones = 16 registers.
template <int kRows>
void tile_unsigned(const PanelTileArgs& args) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sum[kRows][2];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
  const int8_t* w = args.weights;
  for (int64_t i = 0; i < args.steps; ++i, w += args.step_bytes) {
    const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const __m256i a = broadcast_quad(args.a + r * args.a_stride + i * kQuad);
      sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(_mm256_maddubs_epi16(a, w0), ones));
      sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(maddubs_from_memory(a, w + kHalf), ones));
    }
  }
  store_sums(args, sum);
}

// At most 4 rows: 8 sums + w and |w| twice + broadcast + product + ones = 15 registers.
template <int kRows>
void tile_signed(const PanelTileArgs& args) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sum[kRows][2];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
  const int8_t* w = args.weights;
  for (int64_t i = 0; i < args.steps; ++i, w += args.step_bytes) {
    const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    const __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + kHalf));
    const __m256i abs0 = _mm256_abs_epi8(w0), abs1 = _mm256_abs_epi8(w1);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m256i a = broadcast_quad(args.a + r * args.a_stride + i * kQuad);
      const __m256i p0 = _mm256_maddubs_epi16(abs0, _mm256_sign_epi8(a, w0));
      const __m256i p1 = _mm256_maddubs_epi16(abs1, _mm256_sign_epi8(a, w1));
      sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(p0, ones));
      sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(p1, ones));
    }
  }
  store_sums(args, sum);
}

}  // namespace
}  // namespace tcompress::cpu
