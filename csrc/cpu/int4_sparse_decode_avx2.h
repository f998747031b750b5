// The way for few tokens of int4_sparse_linear.h: a lane is one of a block's eight outputs. Weights stay unsigned,
// 0 … 15; what is then too much is 8 times the sum of the activations. Include only below a `#pragma GCC target` that
// has avx2 and fma.
//
// 1. The kept blocks of a block row are listed in fours of one scale each. What a four lacks has activations of 0.
// 2. Each four is summed in integers, scaled and added. It costs an addition more than a span would, but no branch
//    depends on which blocks are kept: a branch that did was taken wrong for each span, which took longer than the
//    span.
//
// A multiplier D has add_four(sum, w, a, positions).
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
static_assert((kFour - 1) * kInt4BlockBytes <= kSparsePad);

// The kept blocks of a block row.
struct Int4Fours {
  uint32_t* positions;  // [fours][4] units
  uint32_t* block;      // [fours] the first one
  uint32_t* scale;      // [fours]
  int64_t count;
};

inline void store_256(uint32_t* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }

inline Int4Fours list_fours(const Int4SparseDecodeArgs& args, int row) {
  // Each part is followed by room for what is stored in vectors after its end.
  const int64_t width = span_units(args.group_shift), room = args.words * kWordUnits + kWordUnits;
  Int4Fours fours{args.list, args.list + room, args.list + 2 * room, 0};
  const __m256i steps = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  const __m128i zero_unit = _mm_set1_epi32(static_cast<int32_t>(args.words * kWordUnits));
  uint32_t at = args.offsets[row];
  for (int64_t word = 0; word < args.words; ++word) {
    const uint64_t allowed = word + 1 == args.words ? args.last_word : ~0ULL;
    const uint64_t kept = kept_bits(args.bitmap[row * args.words + word], allowed, at, args.blocks);
    for (int64_t first = 0; first < kWordUnits; first += width) {
      const int64_t unit = word * kWordUnits + first;
      uint32_t* positions = fours.positions + fours.count * kFour;
      const int listed =
          list_bits_256(kept >> first & span_mask(width), width, static_cast<uint32_t>(unit), 1, positions);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(positions + listed), zero_unit);
      const __m256i scale = _mm256_set1_epi32(static_cast<int32_t>(unit >> args.group_shift));
      for (int64_t i = 0; i < width; i += 8 * kFour) {
        const __m256i first_block = _mm256_set1_epi32(static_cast<int32_t>(at + i));
        store_256(fours.block + fours.count + i / kFour, _mm256_add_epi32(first_block, steps));
        store_256(fours.scale + fours.count + i / kFour, scale);
      }
      fours.count += (listed + kFour - 1) / kFour;
      at += static_cast<uint32_t>(listed);
    }
  }
  return fours;
}

template <class D, int kTokens>
void int4_decode(const Int4SparseDecodeArgs& args) {
  for (int row = 0; row < args.rows; ++row) {
    const Int4Fours fours = list_fours(args, row);
    const float* scales = args.scales + row * args.groups * kMaxBlockRows;
    __m256 total[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) total[t] = _mm256_setzero_ps();
    const uint32_t* positions = fours.positions;
    for (int64_t i = 0; i < fours.count; ++i, positions += kFour) {
      const uint8_t* nibbles = args.values + static_cast<int64_t>(fours.block[i]) * kInt4BlockBytes;
      const __m256 scale = _mm256_loadu_ps(scales + static_cast<int64_t>(fours.scale[i]) * kMaxBlockRows);
      _mm_prefetch(nibbles + kPrefetchBytes, _MM_HINT_T0);
      __m256i w[kFour];
#pragma GCC unroll 4
      for (int b = 0; b < kFour; ++b) w[b] = load_nibbles(nibbles + b * kInt4BlockBytes);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const int32_t* excess = args.excess + t * args.a_stride;
        __m256i sum = _mm256_set1_epi32((excess[positions[0]] + excess[positions[1]]) +
                                        (excess[positions[2]] + excess[positions[3]]));
        D::add_four(sum, w, args.a + t * args.a_stride, positions);
        total[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, total[t]);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) _mm256_storeu_ps(args.acc + t * args.acc_stride + row * kMaxBlockRows, total[t]);
  }
}

template <class D>
void int4_decode_any(const Int4SparseDecodeArgs& args) {
  using Decode = void (*)(const Int4SparseDecodeArgs&);
  constexpr Decode kDecode[] = {int4_decode<D, 1>, int4_decode<D, 2>, int4_decode<D, 3>, int4_decode<D, 4>};
  kDecode[args.tokens - 1](args);
}

}  // namespace
}  // namespace tcompress::cpu
