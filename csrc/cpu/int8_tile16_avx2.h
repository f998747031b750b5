// AVX2 register tile with sums in 16 bits: two rows x 48 outputs, widened only at the end of a run. The flush schedule
// (flush_schedule.h) proves at pack time that no 16-bit lane overflows within a run, for any activation in 0 … 127.
//
// 1. Per step and row: one broadcast of four activations, six vpmaddubsw with the weights from memory, six vpaddw.
// 2. Per run: twelve vpmaddwd by ones add the 16-bit sums to the 32-bit ones in the first-level cache.
// 3. K goes in blocks whose weights stay in the first-level cache while all row pairs pass over them.
//
// Inline assembly, because GCC 12 reaches half of this speed with intrinsics: it spills.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "int8_linear.h"

namespace tcompress::cpu {
namespace {

constexpr int kBlockSteps = 96;  // 96 * 192 bytes = 18 KB of weights

alignas(32) const int16_t kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

#define TC_ZERO(s) "vpxor %%ymm" #s ", %%ymm" #s ", %%ymm" #s "\n\t"
#define TC_MUL(offset, t) "vpmaddubsw " #offset "(%[w]), %%ymm12, %%ymm" #t "\n\t"
#define TC_ADD(t, s) "vpaddw %%ymm" #t ", %%ymm" #s ", %%ymm" #s "\n\t"
// One row of a step; a product is added one multiplication later, when it is ready.
#define TC_ROW(a, s0, s1, s2, s3, s4, s5)                                                                          \
  "vpbroadcastd (%[" a "]), %%ymm12\n\t" TC_MUL(0, 13) TC_MUL(32, 14) TC_ADD(13, s0) TC_MUL(64, 15) TC_ADD(14, s1) \
      TC_MUL(96, 13) TC_ADD(15, s2) TC_MUL(128, 14) TC_ADD(13, s3) TC_MUL(160, 15) TC_ADD(14, s4)                  \
          TC_ADD(15, s5) "addq $4, %[" a "]\n\t"
#define TC_FLUSH(s, offset)                                                                         \
  "vpmaddwd %%ymm12, %%ymm" #s ", %%ymm" #s "\n\tvpaddd " #offset "(%[acc]), %%ymm" #s ", %%ymm" #s \
  "\n\tvmovdqu %%ymm" #s ", " #offset "(%[acc])\n\t"
#define TC_NEXT_STEP "addq $192, %[w]\n\tdecq %[steps]\n\tjnz 1b\n\tvmovdqa %[ones], %%ymm12\n\t"

// Adds a run of `steps` steps to acc [2][48] (acc [1][48] below). Advances the pointers.
inline void run_two_rows(const uint8_t*& a0, const uint8_t*& a1, const int8_t*& w, int64_t steps, int32_t* acc) {
  asm volatile(TC_ZERO(0) TC_ZERO(1) TC_ZERO(2) TC_ZERO(3) TC_ZERO(4) TC_ZERO(5) TC_ZERO(6) TC_ZERO(7) TC_ZERO(8)
                   TC_ZERO(9) TC_ZERO(10) TC_ZERO(11) ".p2align 5\n1:\n\t"                   //
               TC_ROW("a0", 0, 1, 2, 3, 4, 5) TC_ROW("a1", 6, 7, 8, 9, 10, 11) TC_NEXT_STEP  //
                   TC_FLUSH(0, 0) TC_FLUSH(1, 32) TC_FLUSH(2, 64) TC_FLUSH(3, 96) TC_FLUSH(4, 128) TC_FLUSH(5, 160)
                       TC_FLUSH(6, 192) TC_FLUSH(7, 224) TC_FLUSH(8, 256) TC_FLUSH(9, 288) TC_FLUSH(10, 320)
                           TC_FLUSH(11, 352)
               : [a0] "+r"(a0), [a1] "+r"(a1), [w] "+r"(w), [steps] "+r"(steps)
               : [acc] "r"(acc), [ones] "m"(kOnes)
               : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
                 "xmm12", "xmm13", "xmm14", "xmm15", "memory", "cc");
}

inline void run_one_row(const uint8_t*& a0, const int8_t*& w, int64_t steps, int32_t* acc) {
  asm volatile(TC_ZERO(0) TC_ZERO(1) TC_ZERO(2) TC_ZERO(3) TC_ZERO(4) TC_ZERO(5) ".p2align 5\n1:\n\t"  //
               TC_ROW("a0", 0, 1, 2, 3, 4, 5) TC_NEXT_STEP                                             //
                   TC_FLUSH(0, 0) TC_FLUSH(1, 32) TC_FLUSH(2, 64) TC_FLUSH(3, 96) TC_FLUSH(4, 128) TC_FLUSH(5, 160)
               : [a0] "+r"(a0), [w] "+r"(w), [steps] "+r"(steps)
               : [acc] "r"(acc), [ones] "m"(kOnes)
               : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm12", "xmm13", "xmm14", "xmm15", "memory", "cc");
}

#undef TC_ZERO
#undef TC_MUL
#undef TC_ADD
#undef TC_ROW
#undef TC_FLUSH
#undef TC_NEXT_STEP

// A whole group of three panels.
void tile16(const Int8TileArgs& args) {
  for (int i = 0; i < args.rows * kGroup; ++i) args.acc[i] = 0;
  const int8_t* block = args.weights;
  const uint8_t* runs = args.runs;
  for (int64_t done = 0; done < args.steps;) {
    int64_t block_steps = 0, lengths[kBlockSteps];
    int n_runs = 0;
    while (block_steps < kBlockSteps && done + block_steps < args.steps) {
      // A schedule that int8_prepack did not write gives wrong sums, but is not followed out of the group.
      const int64_t run = runs[n_runs], left = args.steps - done - block_steps;
      lengths[n_runs] = run == 0 || run > left ? left : run;
      block_steps += lengths[n_runs++];
    }
    for (int r = 0; r < args.rows; r += 2) {
      const uint8_t* a0 = args.a + r * args.a_stride + done * kQuad;
      const int8_t* w = block;
      int32_t* acc = args.acc + r * kGroup;
      if (r + 1 < args.rows) {
        const uint8_t* a1 = a0 + args.a_stride;
        for (int i = 0; i < n_runs; ++i) run_two_rows(a0, a1, w, lengths[i], acc);
      } else {
        for (int i = 0; i < n_runs; ++i) run_one_row(a0, w, lengths[i], acc);
      }
    }
    done += block_steps;
    runs += n_runs;
    block += block_steps * kGroup * kQuad;
  }
}

}  // namespace
}  // namespace tcompress::cpu
