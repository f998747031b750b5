// AVX2 register tiles of attention: rows of 16-bit integers x 16 columns by vpmaddwd, which adds two products of 16
// bits exactly: 16 products an instruction, the rate of exact 8-bit products (vpmaddubsw and vpmaddwd, 32 in two) with
// 12 bits of precision.
//
// wide    six rows. Inline assembly: twelve sums, two registers of columns, a broadcast, a product; GCC 12 spills with
//         intrinsics and reaches half of the speed.
// narrow  16 bytes are four columns x four k's: widened on the way into the register, each column has two sums in
//         neighbouring lanes, which are added at the end. Up to three rows.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "attention_layout.h"

namespace tcompress::cpu {
namespace {

constexpr int kSumStride = kKeyBlock;  // of the rows of sums: 256 bytes, as TC_STORE's offsets say

#define TC_ZERO(s) "vpxor %%ymm" #s ", %%ymm" #s ", %%ymm" #s "\n\t"
#define TC_ROW(a, s0, s1)                   \
  "vpbroadcastd (%[" a                      \
  "],%[i],4), %%ymm14\n\t"                  \
  "vpmaddwd %%ymm12, %%ymm14, %%ymm15\n\t"  \
  "vpaddd %%ymm15, %%ymm" #s0 ", %%ymm" #s0 \
  "\n\t"                                    \
  "vpmaddwd %%ymm13, %%ymm14, %%ymm14\n\t"  \
  "vpaddd %%ymm14, %%ymm" #s1 ", %%ymm" #s1 "\n\t"
#define TC_STORE(s, offset) "vmovdqu %%ymm" #s ", " #offset "(%[sums])\n\t"

// sums[r * kSumStride + n] = sum over `steps` pairs of a[r] and column n of b, [steps][16][2].
inline void tile_wide(const int16_t* a, int64_t stride, const void* b, int64_t steps, int32_t* sums) {
  int64_t i = 0;
  asm volatile(TC_ZERO(0) TC_ZERO(1) TC_ZERO(2) TC_ZERO(3) TC_ZERO(4) TC_ZERO(5) TC_ZERO(6) TC_ZERO(7) TC_ZERO(8)
                   TC_ZERO(9) TC_ZERO(10) TC_ZERO(11)  //
               ".p2align 5\n1:\n\t"
               "vmovdqu (%[b]), %%ymm12\n\t"
               "vmovdqu 32(%[b]), %%ymm13\n\t"  //
               TC_ROW("a0", 0, 1) TC_ROW("a1", 2, 3) TC_ROW("a2", 4, 5) TC_ROW("a3", 6, 7) TC_ROW("a4", 8, 9)
                   TC_ROW("a5", 10, 11)  //
               "addq $64, %[b]\n\tincq %[i]\n\tcmpq %[n], %[i]\n\tjl 1b\n\t" TC_STORE(0, 0) TC_STORE(1, 32)
                   TC_STORE(2, 256) TC_STORE(3, 288) TC_STORE(4, 512) TC_STORE(5, 544) TC_STORE(6, 768) TC_STORE(7, 800)
                       TC_STORE(8, 1024) TC_STORE(9, 1056) TC_STORE(10, 1280) TC_STORE(11, 1312)
               : [b] "+r"(b), [i] "+r"(i)
               : [a0] "r"(a), [a1] "r"(a + stride), [a2] "r"(a + 2 * stride), [a3] "r"(a + 3 * stride),
                 [a4] "r"(a + 4 * stride), [a5] "r"(a + 5 * stride), [n] "r"(steps), [sums] "r"(sums)
               : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
                 "xmm12", "xmm13", "xmm14", "xmm15", "memory", "cc");
}

#undef TC_ZERO
#undef TC_ROW
#undef TC_STORE

// The same for b [steps][16][4] of bytes; a [kRows][stride] holds four integers a step.
template <int kRows>
inline void tile_narrow(const int16_t* a, int64_t stride, const void* b, int64_t steps, int32_t* sums) {
  constexpr int kParts = 4;  // of four columns
  __m256i sum[kRows][kParts];
#pragma GCC unroll 3
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) sum[r][p] = _mm256_setzero_si256();
  const __m128i* columns = static_cast<const __m128i*>(b);
  for (int64_t i = 0; i < steps; ++i, columns += kParts) {
    __m256i quad[kRows];
#pragma GCC unroll 3
    for (int r = 0; r < kRows; ++r) {
      int64_t four;
      __builtin_memcpy(&four, a + r * stride + i * 4, sizeof(four));
      quad[r] = _mm256_set1_epi64x(four);
    }
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      const __m256i c = _mm256_cvtepi8_epi16(_mm_loadu_si128(columns + p));
#pragma GCC unroll 3
      for (int r = 0; r < kRows; ++r) sum[r][p] = _mm256_add_epi32(sum[r][p], _mm256_madd_epi16(c, quad[r]));
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int p = 0; p < kParts; p += 2) {
      const __m256i pairs = _mm256_hadd_epi32(sum[r][p], sum[r][p + 1]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + r * kSumStride + p * 4),
                          _mm256_permute4x64_epi64(pairs, 0xd8));
    }
}

inline void tile_narrow(const int16_t* a, int64_t stride, int rows, const void* b, int64_t steps, int32_t* sums) {
  int r = 0;
  for (; r + 3 <= rows; r += 3) tile_narrow<3>(a + r * stride, stride, b, steps, sums + r * kSumStride);
  if (rows - r == 2) tile_narrow<2>(a + r * stride, stride, b, steps, sums + r * kSumStride);
  if (rows - r == 1) tile_narrow<1>(a + r * stride, stride, b, steps, sums + r * kSumStride);
}

}  // namespace
}  // namespace tcompress::cpu
