// AVX-512 VNNI: vpdpbusd adds four u8 * s8 products to a 32-bit lane and vpdpwssd two s16 * s16, exact, two a cycle
// each.
//
// narrow  Q K^T: the keys are made unsigned on the way into the register (offset 128, one xor for six queries), and the
//         offset's part, 128 * sum of the query's integers, is what the sums start from.
//         P V: P' of 13 bits is split in two bytes; the sums of the upper ones are shifted left by 8, those of the
//         lower ones added on top: two bytes at the rate of one s16.
// wide    both by vpdpwssd.
//
// A tile is six queries x 64 keys (or channels): 24 sums, 4 registers of keys, 1 broadcast.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

#include <immintrin.h>

#include "attention.h"
#include "attention_softmax.h"
#include "transpose_avx2.h"
#include "vec_avx512.h"

namespace tcompress::cpu {
namespace {

struct Shorts {
  static constexpr int kVecs = 2, kLanes = 32;
  __m512i v;

  static Shorts from_ticks(const Vec* ticks) {
    // Below 16 bits saturates to -32768; a float that does not fit 32 bits, or NaN, becomes the lowest integer first.
    const __m512i both = _mm512_packs_epi32(_mm512_cvtps_epi32(ticks[0].v), _mm512_cvtps_epi32(ticks[1].v));
    return {_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), both)};
  }
  static Shorts load(const int16_t* p) { return {_mm512_loadu_si512(p)}; }
  static Shorts set1(int16_t x) { return {_mm512_set1_epi16(x)}; }
};

// 2^(14 + n) for the exponents n = 0, -31 … -1 modulo 32
alignas(64) const int16_t kPowers[32] = {16384, 0, 0, 0, 0, 0, 0,  0,  0,  0,   0,   0,   0,    0,    0,    0,
                                         0,     0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192};

inline Shorts operator+(Shorts a, Shorts b) { return {_mm512_add_epi16(a.v, b.v)}; }
inline Shorts mul_high(Shorts a, Shorts b) { return {_mm512_mulhrs_epi16(a.v, b.v)}; }
inline Shorts fraction(Shorts a) { return {_mm512_and_si512(_mm512_slli_epi16(a.v, 4), _mm512_set1_epi16(0x7ff0))}; }
inline Shorts power(Shorts ticks) {
  return {_mm512_permutexvar_epi16(_mm512_srli_epi16(ticks.v, 11), _mm512_load_si512(kPowers))};
}
inline int32_t sum(const Shorts (&p)[2]) {
  const __m512i both = _mm512_dpwssd_epi32(_mm512_dpwssd_epi32(_mm512_setzero_si512(), p[0].v, _mm512_set1_epi16(1)),
                                           p[1].v, _mm512_set1_epi16(1));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(both), _mm512_extracti64x4_epi64(both, 1));
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

inline void store_sums(float* out, const Vec (&x)[4]) {
  // Sums of pairs of keys, then of all four: every 128 bits hold a part of each key's sum.
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(x[0].v, x[1].v), _mm512_unpackhi_ps(x[0].v, x[1].v));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(x[2].v, x[3].v), _mm512_unpackhi_ps(x[2].v, x[3].v));
  const __m512 c = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  const __m256 upper = _mm256_castsi256_ps(_mm512_extracti64x4_epi64(_mm512_castps_si512(c), 1));
  const __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), upper);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1)));
}

inline Vec from_integers(const int32_t* p) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(p))}; }
inline void store_integers(int16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a.v)));
}
inline void store_integers(int8_t* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

inline __m512i magnitude(Vec a) { return _mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff)); }
inline __m512i larger(__m512i a, __m512i b) { return _mm512_max_epi32(a, b); }
inline uint32_t largest_lane(__m512i a) {
  const __m256i half = _mm256_max_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1))));
}

template <bool kWide>
struct QueryOf {
  using type = int8_t;
};
template <>
struct QueryOf<true> {
  using type = int16_t;
};

constexpr int kPanelBytes = 64;
constexpr int kMaxPanels = 4;

inline __m512i word_at(const void* p) {
  int32_t word;
  __builtin_memcpy(&word, p, sizeof(word));
  return _mm512_set1_epi32(word);
}

// sum += products of unsigned a and signed b (bytes), or of both signed (16 bits). As assembly, because GCC 12 copies
// the sum before and after the intrinsic and runs out of registers; an emulated build has no such instruction.
#if defined(SIMDE_NO_NATIVE)
inline void add_products(__m512i& sum, __m512i a, __m512i b, bool wide) {
  sum = wide ? _mm512_dpwssd_epi32(sum, a, b) : _mm512_dpbusd_epi32(sum, a, b);
}
#else
__attribute__((always_inline)) inline void add_products(__m512i& sum, __m512i a, __m512i b, bool wide) {
  if (wide) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  } else {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  }
}
#endif

template <bool kWide, int kRows, int kPanels>
void score_tile(const char* q, int64_t stride, const int32_t* sums, const char* keys, int64_t steps, int32_t* s) {
  __m512i sum[kRows][kPanels];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) sum[r][p] = _mm512_set1_epi32(kWide ? 0 : -128 * sums[r]);
  for (int64_t i = 0; i < steps; ++i) {
    __m512i k[kPanels];
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
      k[p] = _mm512_loadu_si512(keys + (p * steps + i) * kPanelBytes);
      if constexpr (!kWide) k[p] = _mm512_xor_si512(k[p], _mm512_set1_epi8(-128));
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const __m512i a = word_at(q + r * stride + i * 4);
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) add_products(sum[r][p], k[p], a, kWide);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) _mm512_storeu_si512(s + r * kKeyBlock + p * kTokenPanel, sum[r][p]);
}

// weights: rows of kWeightBytes, 64 int16 or 64 upper and 64 lower bytes. Both halves in one loop: in two, GCC spills.
template <bool kWide, int kRows, int kPanels>
void value_tile(const uint8_t* weights, const char* values, int64_t steps, int64_t dv, const float* factor,
                float* out) {
  constexpr int kParts = kWide ? 1 : 2;
  constexpr int64_t kPanelStride = kKeyBlock * kChannelPanel * (kWide ? 2 : 1);
  __m512i sum[kRows * kParts][kPanels];
#pragma GCC unroll 6
  for (int r = 0; r < kRows * kParts; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) sum[r][p] = _mm512_setzero_si512();
  for (int64_t i = 0; i < steps; ++i) {
    __m512i v[kPanels];
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) v[p] = _mm512_loadu_si512(values + p * kPanelStride + i * kPanelBytes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows * kParts; ++r) {
      const __m512i a = word_at(weights + r * (kWeightBytes / kParts) + i * 4);
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) add_products(sum[r][p], a, v[p], kWide);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    const __m512 f = _mm512_set1_ps(factor[r]);
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
      __m512i total = sum[r * kParts][p];
      if constexpr (!kWide) total = _mm512_add_epi32(_mm512_slli_epi32(total, 8), sum[r * kParts + 1][p]);
      float* o = out + r * dv + p * kChannelPanel;
      _mm512_storeu_ps(o, _mm512_add_ps(_mm512_loadu_ps(o), _mm512_mul_ps(_mm512_cvtepi32_ps(total), f)));
    }
  }
}

using ScoreTile = void (*)(const char*, int64_t, const int32_t*, const char*, int64_t, int32_t*);
using ValueTile = void (*)(const uint8_t*, const char*, int64_t, int64_t, const float*, float*);

template <bool kWide>
struct Tiles {
  using Query = typename QueryOf<kWide>::type;

  static int32_t sum_of(const Query* q, int64_t n) {
    if constexpr (kWide) return 0;
    __m128i sum = _mm_setzero_si128();
    for (int64_t i = 0; i < n; i += 16) {
      const __m128i pairs = _mm_maddubs_epi16(_mm_set1_epi8(1), load_16(q + i));
      sum = _mm_add_epi32(sum, _mm_madd_epi16(pairs, _mm_set1_epi16(1)));
    }
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
  }

  static void scores(const Query* q, int64_t stride, const int32_t* sums, int rows, const void* keys, int64_t dk,
                     int panels, int32_t* s) {
#define TC_ROWS(r)                                                                                     \
  {                                                                                                    \
    score_tile<kWide, r, 1>, score_tile<kWide, r, 2>, score_tile<kWide, r, 3>, score_tile<kWide, r, 4> \
  }
    static constexpr ScoreTile kTiles[kQueryTile][kMaxPanels] = {TC_ROWS(1), TC_ROWS(2), TC_ROWS(3),
                                                                 TC_ROWS(4), TC_ROWS(5), TC_ROWS(6)};
#undef TC_ROWS
    kTiles[rows - 1][panels - 1](reinterpret_cast<const char*>(q), stride * static_cast<int64_t>(sizeof(Query)), sums,
                                 static_cast<const char*>(keys), dk * static_cast<int64_t>(sizeof(Query)) / 4, s);
  }

  static void store_weights(const Shorts (&p)[2], void* row) {
    if constexpr (kWide) {
      _mm512_storeu_si512(row, p[0].v);
      _mm512_storeu_si512(static_cast<int16_t*>(row) + 32, p[1].v);
    } else {
      const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), low = _mm512_set1_epi16(255);
      const __m512i upper = _mm512_packus_epi16(_mm512_srli_epi16(p[0].v, 8), _mm512_srli_epi16(p[1].v, 8));
      const __m512i lower = _mm512_packus_epi16(_mm512_and_si512(p[0].v, low), _mm512_and_si512(p[1].v, low));
      _mm512_storeu_si512(row, _mm512_permutexvar_epi64(order, upper));
      _mm512_storeu_si512(static_cast<char*>(row) + 64, _mm512_permutexvar_epi64(order, lower));
    }
  }

  static void values(const void* weights, int rows, const void* values, int token_panels, int64_t dv,
                     const float* factor, float* out) {
    constexpr int kMaxRows = kWide ? 6 : 3;
#define TC_ROWS(r)                                                                                     \
  {                                                                                                    \
    value_tile<kWide, r, 1>, value_tile<kWide, r, 2>, value_tile<kWide, r, 3>, value_tile<kWide, r, 4> \
  }
    static constexpr ValueTile kThree[3][kMaxPanels] = {TC_ROWS(1), TC_ROWS(2), TC_ROWS(3)};
    static constexpr ValueTile kSix[3][kMaxPanels] = {TC_ROWS(4), TC_ROWS(5), TC_ROWS(6)};
#undef TC_ROWS
    const int64_t panel_bytes = kKeyBlock * kChannelPanel * static_cast<int64_t>(sizeof(Query));
    const int64_t steps = token_panels * kTokenPanel * static_cast<int64_t>(sizeof(Query)) / 4;
    const int64_t panels = dv / kChannelPanel;
    for (int64_t p = 0; p < panels; p += kMaxPanels) {
      const int64_t n = panels - p < kMaxPanels ? panels - p : kMaxPanels;
      for (int r = 0; r < rows; r += kMaxRows) {
        const int count = rows - r < kMaxRows ? rows - r : kMaxRows;
        const ValueTile tile = count <= 3 ? kThree[count - 1][n - 1] : kSix[count - 4][n - 1];
        tile(static_cast<const uint8_t*>(weights) + r * kWeightBytes,
             static_cast<const char*>(values) + p * panel_bytes, steps, dv, factor + r,
             out + r * dv + p * kChannelPanel);
      }
    }
  }
};

}  // namespace
}  // namespace tcompress::cpu

#include "attention_pack.h"
#include "attention_rows.h"
#include "short_attention_rows.h"

namespace tcompress::cpu {

const AttentionPath kAttentionAvx512Vnni = {/*narrow_prefill=*/true,
                                            attend<Vec, Shorts, Tiles<true>, true>,
                                            attend<Vec, Shorts, Tiles<false>, false>,
                                            combine<Vec>,
                                            key_mean<Vec>,
                                            pack<Vec>,
                                            short_rows<Vec, 4>};

}  // namespace tcompress::cpu

#endif  // __x86_64__
