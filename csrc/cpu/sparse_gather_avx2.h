// Few tokens and block rows of 1 in ymm registers: the places of the kept units are listed, then eight activations at a
// time are gathered to eight consecutive weights. AVX2 has no vpexpandd; spreading the weights by a table took 7 cycles
// for each 8 units of K, kept or not, and this takes one for each byte of the bitmap and one for each kept unit. By
// loads and inserts rather than vpgatherdd, which takes ten cycles on Zen 3.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "sparse_decode.h"
#include "sparse_multiply_avx2.h"

namespace tcompress::cpu {
namespace {

constexpr int kListWords = 16;  // words whose places are listed at a time

struct PlaceTable {
  uint16_t places[256][8];
};

// The set bits of each byte.
constexpr PlaceTable place_table() {
  PlaceTable table{};
  for (int bits = 0; bits < 256; ++bits) {
    int count = 0;
    for (int i = 0; i < 8; ++i)
      if ((bits >> i & 1) != 0) table.places[bits][count++] = static_cast<uint16_t>(i);
  }
  return table;
}

alignas(16) constexpr PlaceTable kPlaces = place_table();

// Appends the set bits of a word, counted from `base`; writes up to eight entries more than it returns. Each byte finds
// its place by itself: a running count would make each wait four cycles for the one before.
inline int list_places(uint64_t bits, int base, uint16_t* list) {
#pragma GCC unroll 8
  for (int byte = 0; byte < 8; ++byte) {
    const uint64_t part = bits >> (byte * 8) & 0xff, before = bits & ((1ULL << (byte * 8)) - 1);
    const __m128i places = _mm_load_si128(reinterpret_cast<const __m128i*>(kPlaces.places[part]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(list + __builtin_popcountll(before)),
                     _mm_add_epi16(places, _mm_set1_epi16(static_cast<int16_t>(base + byte * 8))));
  }
  return __builtin_popcountll(bits);
}

inline __m256i gather_units(const uint32_t* a, const uint16_t* places) {
  const auto unit = [&](int i) { return static_cast<int32_t>(a[places[i]]); };
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
  uint16_t list[kListWords * kWordUnits + 2 * kLanes];
  for (int row = 0; row < args.rows; ++row) {
    uint32_t at = args.offsets[row];
    typename D::Sum sum[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) sum[t] = D::zero();
    for (int64_t first = 0; first < args.words; first += kListWords) {
      int count = 0;
      for (int64_t word = first; word < args.words && word < first + kListWords; ++word) {
        const uint64_t allowed = word + 1 == args.words ? args.last_word : ~0ULL;
        const uint64_t bits =
            kept_bits(args.bitmap[row * args.words + word], allowed, at + static_cast<uint32_t>(count), args.blocks);
        count += list_places(bits, static_cast<int>(word - first) * kWordUnits, list + count);
      }
      // What follows the last place is read with weights of zero, and must be a place too.
      _mm_storeu_si128(reinterpret_cast<__m128i*>(list + count), _mm_setzero_si128());
      const uint32_t* a = args.a + first * kWordUnits;
      const uint32_t* values = args.values + at;
      int i = 0;
      for (; i + kLanes <= count; i += kLanes) {
        __builtin_prefetch(reinterpret_cast<const char*>(values + i) + kFetchAhead);
        const __m256i w = load_256(values + i);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t)
          sum[t] = D::multiply_add(sum[t], D::from_units(gather_units(a + t * args.a_stride, list + i)), D::weights(w));
      }
      if (i < count) {
        const __m256i w = _mm256_and_si256(load_256(values + i), first_lanes(count - i));
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t)
          sum[t] = D::multiply_add(sum[t], D::from_units(gather_units(a + t * args.a_stride, list + i)), D::weights(w));
      }
      at += static_cast<uint32_t>(count);
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
