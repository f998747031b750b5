// The way for few tokens of int4_sparse_linear.h with four blocks in a register: the outputs of each are a quarter,
// outputs 0 … 3 in the low nibbles and 4 … 7 in the high ones. A token's activations of the kept units are put side by
// side first, in fours of one scale each that end in zeros; quarters are added at the end of a block row.
//
// Half to a third of the time of int4_sparse_decode_avx2.h. Include only below a `#pragma GCC target` with avx512vnni.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "int4_sparse_decode_avx2.h"
#include "int4_sparse_linear.h"
#include "int4_sparse_tile.h"

namespace tcompress::cpu {
namespace {

constexpr int kZmmUnits = 16;

// Lists the fours of a block row, and the activations of each token in turn. Returns the number of fours.
template <int kTokens>
inline int64_t gather_fours(const Int4SparseDecodeArgs& args, int row, uint32_t* block, uint32_t* scale, uint32_t* a,
                            int64_t stride) {
  const int64_t width = span_units(args.group_shift);
  const __m512i steps = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60);
  uint32_t at = args.offsets[row];
  int64_t fours = 0;
  for (int64_t word = 0; word < args.words; ++word) {
    const uint64_t allowed = word + 1 == args.words ? args.last_word : ~0ULL;
    const uint64_t kept = kept_bits(args.bitmap[row * args.words + word], allowed, at, args.blocks);
    for (int64_t first = 0; first < kWordUnits; first += width) {
      const int64_t unit = word * kWordUnits + first;
      uint64_t bits = kept >> first & span_mask(width);
      int64_t out = fours * kFour;
      const int count = __builtin_popcountll(bits);
      for (int64_t i = 0; i < width; i += kZmmUnits, bits >>= kZmmUnits) {
        const __mmask16 mask = static_cast<__mmask16>(bits);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t)
          _mm512_storeu_si512(
              a + t * stride + out,
              _mm512_maskz_compress_epi32(mask, _mm512_loadu_si512(args.a + t * args.a_stride + unit + i)));
        out += __builtin_popcountll(bits & 0xffff);
      }
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(a + t * stride + out), _mm_setzero_si128());
      _mm512_storeu_si512(block + fours, _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(at)), steps));
      _mm512_storeu_si512(scale + fours, _mm512_set1_epi32(static_cast<int32_t>(unit >> args.group_shift)));
      fours += (count + kFour - 1) / kFour;
      at += static_cast<uint32_t>(count);
    }
  }
  return fours;
}

inline __m512 broadcast_quarter(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }

inline __m128 add_quarters(__m512 v) {
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(v), high);
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

template <class D, int kTokens>
void int4_decode_quarters(const Int4SparseDecodeArgs& args) {
  // Each part of the list is followed by room for what is stored in vectors after its end.
  const int64_t stride = args.words * kWordUnits + kWordUnits;
  uint32_t *a = args.list, *block = a + kMaxInt4DecodeTokens * stride, *scale = block + stride;
  const __m512i low = _mm512_set1_epi8(15), zeros = _mm512_set1_epi8(kInt4Zero);
  const __m512i quarters = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  for (int row = 0; row < args.rows; ++row) {
    const int64_t fours = gather_fours<kTokens>(args, row, block, scale, a, stride);
    const float* scales = args.scales + row * args.groups * kMaxBlockRows;
    __m512 total[kTokens][2];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) total[t][0] = total[t][1] = _mm512_setzero_ps();
    for (int64_t i = 0; i < fours; ++i) {
      const uint8_t* nibbles = args.values + static_cast<int64_t>(block[i]) * kInt4BlockBytes;
      _mm_prefetch(nibbles + kPrefetchBytes, _MM_HINT_T0);
      const __m512i both = _mm512_loadu_si512(nibbles);
      const __m512i w[2] = {_mm512_and_si512(both, low), _mm512_and_si512(_mm512_srli_epi16(both, 4), low)};
      const float* eight = scales + static_cast<int64_t>(scale[i]) * kMaxBlockRows;
      const __m512 s[2] = {broadcast_quarter(eight), broadcast_quarter(eight + kInt4BlockQuads)};
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const __m128i four = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + t * stride + i * kFour));
        const __m512i activations = _mm512_permutexvar_epi32(quarters, _mm512_castsi128_si512(four));
        __m512i excess = _mm512_setzero_si512();
        D::dot(excess, zeros, activations);
        excess = _mm512_sub_epi32(_mm512_setzero_si512(), excess);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          __m512i sum = excess;
          D::dot(sum, w[half], activations);
          total[t][half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), s[half], total[t][half]);
        }
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half)
        _mm_storeu_ps(args.acc + t * args.acc_stride + row * kMaxBlockRows + half * kInt4BlockQuads,
                      add_quarters(total[t][half]));
  }
}

template <class D>
void int4_decode_quarters_any(const Int4SparseDecodeArgs& args) {
  using Decode = void (*)(const Int4SparseDecodeArgs&);
  constexpr Decode kDecode[] = {int4_decode_quarters<D, 1>, int4_decode_quarters<D, 2>, int4_decode_quarters<D, 3>,
                                int4_decode_quarters<D, 4>};
  kDecode[args.tokens - 1](args);
}

}  // namespace
}  // namespace tcompress::cpu
