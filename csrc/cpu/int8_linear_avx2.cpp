// AVX2: vpmaddubsw multiplies unsigned by signed bytes and adds neighbours in 16 bits, vpmaddwd by ones widens to 32.
// Both run on two ports, so 32 MAC a cycle is the bound; the tile keeps all sums in registers for the whole of K.
//
// 1. asymmetric (a in 0 … 127):    a u8 * w s8,        pair sum at most 2*127*128 = 32512 < 32768: never saturates
// 2. symmetric  (a in -127 … 127): |w| u8 * (a with the sign of w) s8, the same bound, w = -128 included
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")

#include <immintrin.h>

#include "epilogue.h"
#include "int8_linear.h"
#include "vec_avx2.h"

namespace tcompress::cpu {
namespace {

constexpr int kMaxRows = 6;        // 6 rows x 2 ymm of sums + 1 weight + broadcast + product + ones = 16 registers
constexpr int kMaxRowsSigned = 4;  // 4 x 2 sums + w and |w| + broadcast + product = 14
constexpr int kHalf = 32;          // bytes of one ymm: 8 outputs x 4 k's

inline __m256i broadcast_quad(const uint8_t* a) {
  int32_t quad;
  __builtin_memcpy(&quad, a, sizeof(quad));
  return _mm256_set1_epi32(quad);
}

// maddubs with the weight taken from memory. As an intrinsic, GCC 12 loads it to a 17th register and spills a sum.
inline __m256i maddubs_from_memory(__m256i a, const int8_t* w) {
  __m256i product;
  asm("vpmaddubsw %2, %1, %0" : "=x"(product) : "x"(a), "m"(*reinterpret_cast<const __m256i_u*>(w)));
  return product;
}

inline void store_sums(int32_t* acc, __m256i lo, __m256i hi) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc), lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + kPanel / 2), hi);
}

template <int kRows>
void tile_unsigned(const Int8TileArgs& args) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sum[kRows][2];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
  const int8_t* w = args.panels;
  for (int64_t k = 0; k < args.k_padded; k += kQuad, w += 2 * kHalf) {
    const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const __m256i a = broadcast_quad(args.a + r * args.a_stride + k);
      sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(_mm256_maddubs_epi16(a, w0), ones));
      sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(maddubs_from_memory(a, w + kHalf), ones));
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) store_sums(args.acc + r * kPanel, sum[r][0], sum[r][1]);
}

template <int kRows>
void tile_signed(const Int8TileArgs& args) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sum[kRows][2];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
  const int8_t* w = args.panels;
  for (int64_t k = 0; k < args.k_padded; k += kQuad, w += 2 * kHalf) {
    const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    const __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + kHalf));
    const __m256i abs0 = _mm256_abs_epi8(w0), abs1 = _mm256_abs_epi8(w1);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m256i a = broadcast_quad(args.a + r * args.a_stride + k);
      const __m256i p0 = _mm256_maddubs_epi16(abs0, _mm256_sign_epi8(a, w0));
      const __m256i p1 = _mm256_maddubs_epi16(abs1, _mm256_sign_epi8(a, w1));
      sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(p0, ones));
      sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(p1, ones));
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) store_sums(args.acc + r * kPanel, sum[r][0], sum[r][1]);
}

constexpr void (*kUnsigned[])(const Int8TileArgs&) = {tile_unsigned<1>, tile_unsigned<2>, tile_unsigned<3>,
                                                      tile_unsigned<4>, tile_unsigned<5>, tile_unsigned<6>};
constexpr void (*kSigned[])(const Int8TileArgs&) = {tile_signed<1>, tile_signed<2>, tile_signed<3>, tile_signed<4>};

void unsigned_any(const Int8TileArgs& args) { kUnsigned[args.rows - 1](args); }

void signed_any(const Int8TileArgs& args) {
  Int8TileArgs part = args;
  for (int r = 0; r < args.rows; r += kMaxRowsSigned) {
    part.a = args.a + r * args.a_stride;
    part.acc = args.acc + r * kPanel;
    part.rows = args.rows - r < kMaxRowsSigned ? args.rows - r : kMaxRowsSigned;
    kSigned[part.rows - 1](part);
  }
}

}  // namespace

const Int8LinearPath kInt8LinearAvx2 = {kMaxRows, 1, 0, quantize_row_avx2, signed_any, unsigned_any, epilogue_for<Vec>};

}  // namespace tcompress::cpu

#endif  // __x86_64__
