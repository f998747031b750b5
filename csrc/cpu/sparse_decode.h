// The way for few tokens of sparse_linear.h, as templates over the multiplier of a path (sparse_tile.h). Chains are cut
// as there; with block rows of 1 they are short, because each lane and each of two registers is one.
#pragma once

#include <cstdint>

#include "sparse_linear.h"
#include "sparse_tile.h"

namespace tcompress::cpu {
namespace {

// How far ahead values are fetched, in bytes: memory gives more to whom asks early (1.5 to 2 times as fast at 4096 x
// 4096).
constexpr int kFetchAhead = 2048;

// The lines that a word's values take, up to half a word's.
inline void fetch_values(const uint32_t* values) {
  const char* p = reinterpret_cast<const char*>(values) + kFetchAhead;
  __builtin_prefetch(p);
  __builtin_prefetch(p + kCacheLine);
}

// Block rows of 1: lanes are units along K. D::spread(p, bits) puts the units from p on where bits are set, and zeros
// elsewhere; D::store_total adds all lanes.
template <class D, int kTokens>
void decode_one(const SparseDecodeArgs& args) {
  constexpr int kLanes = D::kLanes, kParts = kWordUnits / kLanes;
  for (int row = 0; row < args.rows; ++row) {
    uint32_t at = args.offsets[row];
    typename D::Sum sum[kTokens][2];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) sum[t][0] = sum[t][1] = D::zero();
    for (int64_t word = 0; word < args.words; ++word) {
      const uint64_t allowed = word + 1 == args.words ? args.last_word : ~0ULL;
      const uint64_t bits = kept_bits(args.bitmap[row * args.words + word], allowed, at, args.blocks);
      if (bits == 0) continue;
      fetch_values(args.values + at);
      const uint32_t* a = args.a + word * kWordUnits;
#pragma GCC unroll 8
      for (int part = 0; part < kParts; ++part) {
        // All parts start from `at` rather than from one another: no chain of additions.
        const uint64_t before = bits & ((1ULL << (part * kLanes)) - 1);
        const auto w = D::spread(args.values + at + __builtin_popcountll(before),
                                 static_cast<uint32_t>(bits >> (part * kLanes)) & ((1u << kLanes) - 1));
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t)
          sum[t][part & 1] = D::multiply_add(sum[t][part & 1], D::load(a + t * args.a_stride + part * kLanes), w);
      }
      at += static_cast<uint32_t>(__builtin_popcountll(bits));
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) D::store_total(args.acc + t * args.acc_stride + row, sum[t][0], sum[t][1]);
  }
}

// Block rows of 8: lanes are outputs. D has eight lanes.
template <class D, int kTokens>
void decode_eight(const SparseDecodeArgs& args) {
  static_assert(D::kLanes == kMaxBlockRows);
  for (int row = 0; row < args.rows; ++row) {
    uint32_t at = args.offsets[row];
    typename D::Sum sum[kTokens][2], total[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) sum[t][0] = sum[t][1] = total[t] = D::zero();
    uint32_t chain_end = at + 2 * kMinChain;
    for (int64_t word = 0; word < args.words; ++word) {
      const uint64_t allowed = word + 1 == args.words ? args.last_word : ~0ULL;
      uint64_t bits = kept_bits(args.bitmap[row * args.words + word], allowed, at, args.blocks);
      const uint32_t* a = args.a + word * kWordUnits;
      const auto step = [&](int chain) __attribute__((always_inline)) {
        const uint32_t* unit = a + __builtin_ctzll(bits);
        const uint32_t* block = args.values + static_cast<int64_t>(at) * kMaxBlockRows;
        __builtin_prefetch(reinterpret_cast<const char*>(block) + kFetchAhead);
        const auto w = D::load_weights(block);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t)
          sum[t][chain] = D::multiply_add(sum[t][chain], D::broadcast_activation(unit + t * args.a_stride), w);
        bits &= bits - 1;
        ++at;
      };
      while (bits != 0) {
        step(0);
        if (bits != 0) step(1);
      }
      if (!D::kRounds || at < chain_end) continue;
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        total[t] = D::add(total[t], D::add(sum[t][0], sum[t][1]));
        sum[t][0] = sum[t][1] = D::zero();
      }
      chain_end = at + 2 * kMinChain;
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t)
      D::store_sum(args.acc + t * args.acc_stride + row * kMaxBlockRows,
                   D::add(total[t], D::add(sum[t][0], sum[t][1])));
  }
}

template <class D>
void decode_one_any(const SparseDecodeArgs& args) {
  constexpr SparseDecode kDecode[kMaxDecodeRows] = {decode_one<D, 1>, decode_one<D, 2>, decode_one<D, 3>,
                                                    decode_one<D, 4>};
  kDecode[args.tokens - 1](args);
}

template <class D>
void decode_eight_any(const SparseDecodeArgs& args) {
  constexpr SparseDecode kDecode[kMaxDecodeRows] = {decode_eight<D, 1>, decode_eight<D, 2>, decode_eight<D, 3>,
                                                    decode_eight<D, 4>};
  kDecode[args.tokens - 1](args);
}

}  // namespace
}  // namespace tcompress::cpu
