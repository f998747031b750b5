// Blocks of int4_sparse_layout.h to signed bytes, for unsigned activations; include only below a `#pragma GCC target`
// that has avx2.
//
// A 16-bit lane of a span adds (a' + 128) * w for two of a unit's four k's, and starts from -128 * sum w: modulo 2^16
// that is sum a' w, so that it is exact where that fits, whatever the partial sums. With |a'| <= 127 it fits where a
// lane's sum |w| <= 258, and in any 16 blocks: 16 * 2 * 127 * 8 = 32512. No product of a pair saturates: 2 * 255 * 8.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "flush_schedule.h"
#include "int4_sparse_linear.h"
#include "sparse_positions.h"

namespace tcompress::cpu {
namespace {

constexpr int kPrefetchBytes = 1024;  // two words ahead where half of the blocks are kept
constexpr int kSafe16Blocks = 16;
static_assert(kSafe16Blocks * 2 * 127 * kInt4Zero <= 32767);
static_assert(kMaxLaneSum * 127 <= 32767);

inline int list_bits_256(uint64_t bits, int64_t width, uint32_t first, uint32_t stride, uint32_t* out) {
  return list_bits(bits, width, first, stride, out, [](uint32_t* p, const uint8_t* kept, uint32_t f, uint32_t s) {
    const __m256i unit = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kept)));
    const __m256i listed = _mm256_add_epi32(unit, _mm256_set1_epi32(static_cast<int32_t>(f)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        s == 1 ? listed : _mm256_mullo_epi32(listed, _mm256_set1_epi32(static_cast<int32_t>(s))));
  });
}

// The eight outputs of a block in order, each weight + 8.
inline __m256i load_nibbles(const uint8_t* p) {
  const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i shifted = _mm256_srlv_epi32(twice, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
  return _mm256_and_si256(shifted, _mm256_set1_epi8(15));
}

// kPairs: a span is summed in 16 bits, and starts from two words a lane; otherwise in 32 bits.
template <bool kPairs>
struct UnsignedUnpacker {
  static constexpr int kSafeBlocks = kPairs ? kSafe16Blocks : kWordUnits;

  static int list(uint64_t bits, int64_t width, uint32_t first, uint32_t stride, uint32_t* out) {
    return list_bits_256(bits, width, first, stride, out);
  }

  static bool unpack(const uint8_t* nibbles, int count, uint32_t* values, uint32_t* starts) {
    const __m256i ones = _mm256_set1_epi8(1), zero = _mm256_setzero_si256();
    __m256i sum = zero, size = zero;  // 16 bits hold 64 * 2 * 8
    for (int b = 0; b < count; ++b, nibbles += kInt4BlockBytes, values += kMaxBlockRows) {
      _mm_prefetch(nibbles + kPrefetchBytes, _MM_HINT_T0);
      const __m256i w = _mm256_sub_epi8(load_nibbles(nibbles), _mm256_set1_epi8(kInt4Zero));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), w);
      sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(ones, w));
      if constexpr (kPairs) size = _mm256_add_epi16(size, _mm256_maddubs_epi16(_mm256_abs_epi8(w), ones));
    }
    const __m256i start = kPairs ? _mm256_slli_epi16(_mm256_sub_epi16(zero, sum), 7)
                                 : _mm256_slli_epi32(_mm256_madd_epi16(sum, _mm256_set1_epi16(-1)), 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(starts), start);
    return _mm256_testz_si256(_mm256_cmpgt_epi16(size, _mm256_set1_epi16(kMaxLaneSum)), ones) != 0;
  }
};

}  // namespace
}  // namespace tcompress::cpu
