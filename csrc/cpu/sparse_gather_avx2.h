// Few tokens and block rows of 1 in ymm registers: by the positions of the kept units eight activations at a time are
// gathered to eight consecutive weights. AVX2 has no vpexpandd; spreading the weights by a table took 7 cycles for each
// 8 units of K, kept or not. By loads and inserts rather than vpgatherdd, which takes ten cycles on Zen 3.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "sparse_decode.h"
#include "sparse_multiply_avx2.h"

namespace tcompress::cpu {
namespace {

inline __m256i gather_units(const uint32_t* a, const uint8_t* positions) {
  const auto unit = [&](int i) { return static_cast<int32_t>(a[positions[i]]); };
  return _mm256_setr_epi32(unit(0), unit(1), unit(2), unit(3), unit(4), unit(5), unit(6), unit(7));
}

// The first n lanes of eight.
inline __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// D::from_units makes a register of activations, D::weights one of weights, of eight units.
template <class D, int kTokens>
void decode_gather(const SparseDecodeArgs& args) {
  constexpr int kLanes = 8;
  for (int row = 0; row < args.rows; ++row) {
    uint32_t at = args.offsets[row];
    typename D::Sum sum[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) sum[t] = D::zero();
    for (int64_t word = 0; word < args.words;) {
      const uint32_t* a = args.a + word * kWordUnits;
      const uint32_t begin = at;
      for (const int64_t end = smaller(word + kSegmentWords, args.words); word < end; ++word) {
        const uint64_t allowed = word + 1 == args.words ? args.last_word : ~0ULL;
        at += static_cast<uint32_t>(
            __builtin_popcountll(kept_bits(args.bitmap[row * args.words + word], allowed, at, args.blocks)));
      }
      const uint32_t* values = args.values + begin;
      const uint8_t* positions = args.positions + begin;
      const int count = static_cast<int>(at - begin);
      int i = 0;
      for (; i + kLanes <= count; i += kLanes) {
        __builtin_prefetch(reinterpret_cast<const char*>(values + i) + kFetchAhead);
        const __m256i w = load_256(values + i);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t)
          sum[t] =
              D::multiply_add(sum[t], D::from_units(gather_units(a + t * args.a_stride, positions + i)), D::weights(w));
      }
      if (i < count) {  // what follows the last position is one too, and meets weights of zero
        const __m256i w = _mm256_and_si256(load_256(values + i), first_lanes(count - i));
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t)
          sum[t] =
              D::multiply_add(sum[t], D::from_units(gather_units(a + t * args.a_stride, positions + i)), D::weights(w));
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) D::store_total(args.acc + t * args.acc_stride + row, sum[t], D::zero());
  }
}

template <class D>
void decode_gather_any(const SparseDecodeArgs& args) {
  constexpr SparseDecode kDecode[kMaxDecodeRows] = {decode_gather<D, 1>, decode_gather<D, 2>, decode_gather<D, 3>,
                                                    decode_gather<D, 4>};
  kDecode[args.tokens - 1](args);
}

}  // namespace
}  // namespace tcompress::cpu
