// The AVX2 tile of the int4 layer that most of the work goes through: two rows x 48 outputs, 12 sums of 16 bits, one
// span of 8 steps at a time (int4_tile_avx2.h has the bounds).
//
// Inline assembly, because GCC 12 spills. A weight is loaded once for both rows: it is the unsigned operand, which
// vpmaddubsw takes from a register only.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "int4_linear.h"
#include "int4_tile_avx2.h"

namespace tcompress::cpu {
namespace {

static_assert(kSpanSteps == 8);  // .rept below

#define TC_COLUMN(offset, s0, s1)            \
  "vmovdqu " #offset                         \
  "(%[w]), %%ymm14\n\t"                      \
  "vpmaddubsw %%ymm12, %%ymm14, %%ymm15\n\t" \
  "vpmaddubsw %%ymm13, %%ymm14, %%ymm14\n\t" \
  "vpaddw %%ymm15, %%ymm" #s0 ", %%ymm" #s0  \
  "\n\t"                                     \
  "vpaddw %%ymm14, %%ymm" #s1 ", %%ymm" #s1 "\n\t"

// Adds a span to sums [2][6]; 192 bytes of weights a step. Advances the pointers.
inline void add_span(const int8_t*& a, int64_t a_stride, const uint8_t*& w, __m256i (&sum)[2][6]) {
  register __m256i s0 asm("xmm0") = sum[0][0];
  register __m256i s1 asm("xmm1") = sum[0][1];
  register __m256i s2 asm("xmm2") = sum[0][2];
  register __m256i s3 asm("xmm3") = sum[0][3];
  register __m256i s4 asm("xmm4") = sum[0][4];
  register __m256i s5 asm("xmm5") = sum[0][5];
  register __m256i s6 asm("xmm6") = sum[1][0];
  register __m256i s7 asm("xmm7") = sum[1][1];
  register __m256i s8 asm("xmm8") = sum[1][2];
  register __m256i s9 asm("xmm9") = sum[1][3];
  register __m256i s10 asm("xmm10") = sum[1][4];
  register __m256i s11 asm("xmm11") = sum[1][5];
  asm volatile(
      // An assembler's loop: a counter would be one operand more than GCC takes.
      ".rept 8\n\t"
      "vpbroadcastd (%[a]), %%ymm12\n\tvpbroadcastd (%[a],%[stride]), %%ymm13\n\t"                          //
      TC_COLUMN(0, 0, 6) TC_COLUMN(32, 1, 7) TC_COLUMN(64, 2, 8) TC_COLUMN(96, 3, 9) TC_COLUMN(128, 4, 10)  //
      TC_COLUMN(160, 5, 11)                                                                                 //
      "addq $4, %[a]\n\taddq $192, %[w]\n\t.endr"
      : [a] "+r"(a), [w] "+r"(w), "+x"(s0), "+x"(s1), "+x"(s2), "+x"(s3), "+x"(s4), "+x"(s5), "+x"(s6), "+x"(s7),
        "+x"(s8), "+x"(s9), "+x"(s10), "+x"(s11)
      : [stride] "r"(a_stride)
      : "xmm12", "xmm13", "xmm14", "xmm15", "memory", "cc");
  sum[0][0] = s0, sum[0][1] = s1, sum[0][2] = s2, sum[0][3] = s3, sum[0][4] = s4, sum[0][5] = s5;
  sum[1][0] = s6, sum[1][1] = s7, sum[1][2] = s8, sum[1][3] = s9, sum[1][4] = s10, sum[1][5] = s11;
}

#undef TC_COLUMN

template <class Scale>
void tile16(const Int4TileArgs& args, int r0) {
  constexpr int kHalfPanels = kGroup / kLanes;
  const int8_t* a = static_cast<const int8_t*>(args.a) + r0 * args.a_stride;
  const uint8_t* w = static_cast<const uint8_t*>(args.weights);
  const Scale* scales = static_cast<const Scale*>(args.scales);
  const uint8_t* zero_points = args.zero_points;
  const int32_t* correction = args.corrections + r0 * args.correction_stride;
  float* acc = args.acc + r0 * kGroup;
  int64_t in_group = 0;
  for (int64_t step = 0; step < args.steps; step += kSpanSteps, ++correction) {
    __m256i sum[2][kHalfPanels];
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      const __m256i word = broadcast_word(correction + r * args.correction_stride);
#pragma GCC unroll 6
      for (int h = 0; h < kHalfPanels; ++h) sum[r][h] = start(word, zero_points, h * kLanes);
    }
    add_span(a, args.a_stride, w, sum);
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r)
#pragma GCC unroll 6
      for (int h = 0; h < kHalfPanels; ++h) add_scaled(sum[r][h], scales + h * kLanes, acc + r * kGroup + h * kLanes);
    if (++in_group == args.spans_per_group) {
      in_group = 0;
      scales += kGroup;
      if (zero_points != nullptr) zero_points += kGroup;
    }
  }
}

}  // namespace
}  // namespace tcompress::cpu
