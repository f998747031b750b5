// The way for few tokens of int4_sparse_linear.h: a lane is one of a block's eight outputs. Weights stay unsigned,
// 0 … 15; what is then too much is 8 times the sum of the activations. Include only below a `#pragma GCC target` that
// has avx2 and fma.
//
// Four blocks at a time, the last ones with activations of 0, so that no branch depends on the number of blocks more
// often than every four. A multiplier D has: kChains (sums of a token) and add_four(sums, w, a, positions).
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "int4_sparse_linear.h"
#include "int4_sparse_tile.h"
#include "int4_sparse_unpack_avx2.h"
#include "sparse_multiply_avx2.h"
#include "sparse_positions.h"

namespace tcompress::cpu {
namespace {

constexpr int kFour = 4;
static_assert(kFour - 1 <= kListSlack);
static_assert((kFour - 1) * kInt4BlockBytes <= kSparsePad);

template <class D, int kTokens>
void int4_decode(const Int4SparseDecodeArgs& args) {
  const int64_t width = span_units(args.group_shift);
  const uint32_t zero_unit = static_cast<uint32_t>(args.words * kWordUnits);
  for (int row = 0; row < args.rows; ++row) {
    uint32_t at = args.offsets[row];
    __m256 total[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) total[t] = _mm256_setzero_ps();
    for (int64_t word = 0; word < args.words; ++word) {
      const uint64_t allowed = word + 1 == args.words ? args.last_word : ~0ULL;
      const uint64_t kept = kept_bits(args.bitmap[row * args.words + word], allowed, at, args.blocks);
      for (int64_t first = 0; first < kWordUnits; first += width) {
        uint32_t positions[kWordUnits + kListSlack];
        const int64_t unit = word * kWordUnits + first;
        const int count =
            list_bits_256(kept >> first & span_mask(width), width, static_cast<uint32_t>(unit), 1, positions);
        if (count == 0) continue;
        for (int i = 0; i < kFour - 1; ++i) positions[count + i] = zero_unit;
        const uint8_t* nibbles = args.values + static_cast<int64_t>(at) * kInt4BlockBytes;
        __m256i sum[kTokens][D::kChains];
        int32_t excess[kTokens];
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          excess[t] = 0;
#pragma GCC unroll 4
          for (int c = 0; c < D::kChains; ++c) sum[t][c] = _mm256_setzero_si256();
        }
        for (int i = 0; i < count; i += kFour, nibbles += kFour * kInt4BlockBytes) {
          __m256i w[kFour];
#pragma GCC unroll 4
          for (int b = 0; b < kFour; ++b) w[b] = load_nibbles(nibbles + b * kInt4BlockBytes);
#pragma GCC unroll 4
          for (int t = 0; t < kTokens; ++t) {
            D::add_four(sum[t], w, args.a + t * args.a_stride, positions + i);
#pragma GCC unroll 4
            for (int b = 0; b < kFour; ++b) excess[t] += args.unit_sums[t * args.a_stride + positions[i + b]];
          }
        }
        const int64_t scale = row * args.groups + (unit >> args.group_shift);
        const __m256 scales = _mm256_loadu_ps(args.scales + scale * kMaxBlockRows);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          __m256i s = sum[t][0];
#pragma GCC unroll 3
          for (int c = 1; c < D::kChains; ++c) s = _mm256_add_epi32(s, sum[t][c]);
          s = _mm256_sub_epi32(s, _mm256_set1_epi32(excess[t] * kInt4Zero));
          total[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(s), scales, total[t]);
        }
        at += static_cast<uint32_t>(count);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) _mm256_storeu_ps(args.acc + t * args.acc_stride + row * kMaxBlockRows, total[t]);
  }
}

// D: a template over the number of tokens.
template <template <int> class D>
void int4_decode_any(const Int4SparseDecodeArgs& args) {
  using Decode = void (*)(const Int4SparseDecodeArgs&);
  constexpr Decode kDecode[] = {int4_decode<D<1>, 1>, int4_decode<D<2>, 2>, int4_decode<D<3>, 3>, int4_decode<D<4>, 4>};
  kDecode[args.tokens - 1](args);
}

// Enough sums of a dot product, which takes five cycles, to start one or two in each; no more than registers hold.
constexpr int dot_chains(int tokens) { return tokens == 1 ? 4 : (tokens == 2 ? 2 : 1); }

}  // namespace
}  // namespace tcompress::cpu
