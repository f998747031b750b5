// Portable attention, one element at a time.
#include "attention.h"
#include "attention_softmax.h"
#include "vec_scalar.h"

namespace tcompress::cpu {
namespace {

struct Shorts {
  static constexpr int kVecs = 1, kLanes = 1;
  int32_t v;

  static Shorts from_ticks(const Vec* ticks) {
    // Rounding by addition needs a number near zero; NaN compares false.
    return {ticks->v > -32768.f ? static_cast<int32_t>(round_half_even(ticks->v)) : -32768};
  }
  static Shorts load(const int16_t* p) { return {*p}; }
  static Shorts set1(int16_t x) { return {x}; }
};

inline Shorts operator+(Shorts a, Shorts b) { return {a.v + b.v}; }
inline Shorts mul_high(Shorts a, Shorts b) { return {(a.v * b.v + 0x4000) >> 15}; }
inline Shorts fraction(Shorts a) { return {(a.v & 2047) << 4}; }
inline Shorts power(Shorts ticks) {
  const int shift = 14 + (ticks.v >> 11);
  return {shift < 0 ? 0 : 1 << shift};
}
template <int kCount>
inline int32_t sum(const Shorts (&p)[kCount]) {
  int32_t total = 0;
  for (const Shorts& one : p) total += one.v;
  return total;
}

inline void store_sums(float* out, const Vec (&x)[4]) {
  for (int i = 0; i < 4; ++i) out[i] = x[i].v;
}

inline Vec from_integers(const int32_t* p) { return {static_cast<float>(*p)}; }
inline void store_integers(int16_t* p, Vec a) { *p = static_cast<int16_t>(round_half_even(a.v)); }
inline void store_integers(int8_t* p, Vec a) { *p = static_cast<int8_t>(round_half_even(a.v)); }
inline uint32_t magnitude(Vec a) { return bits_from_float(a.v) & 0x7fffffffu; }
inline uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }
inline uint32_t largest_lane(uint32_t a) { return a; }

inline void transpose_words(const int32_t* rows, int64_t stride, int64_t words, int32_t* out) {
  for (int64_t w = 0; w < words; ++w)
    for (int t = 0; t < kTokenPanel; ++t) out[w * kTokenPanel + t] = rows[t * stride + w];
}

template <class T>
inline void interleave(const T* rows, int64_t stride, T* out) {
  constexpr int kRun = 4 / sizeof(T);
  for (int i = 0; i < kChannelPanel; ++i)
    for (int e = 0; e < kRun; ++e) out[i * kRun + e] = rows[e * stride + i];
}

// Integers that lie kRun to a 32-bit word.
template <class T>
struct Tiles {
  using Query = T;
  static constexpr int kRun = 4 / sizeof(T);

  static int32_t sum_of(const Query*, int64_t) { return 0; }

  static void scores(const Query* q, int64_t stride, const int32_t*, int rows, const void* keys, int64_t dk, int panels,
                     int32_t* s) {
    for (int r = 0; r < rows; ++r)
      for (int j = 0; j < panels * kTokenPanel; ++j) {
        const T* k = static_cast<const T*>(keys) + j / kTokenPanel * kTokenPanel * dk + j % kTokenPanel * kRun;
        int32_t total = 0;
        for (int64_t i = 0; i < dk; ++i) total += q[r * stride + i] * k[i / kRun * kTokenPanel * kRun + i % kRun];
        s[r * kKeyBlock + j] = total;
      }
  }

  static void store_weights(const Shorts (&p)[kKeyBlock], void* row) {
    for (int j = 0; j < kKeyBlock; ++j) static_cast<int16_t*>(row)[j] = static_cast<int16_t>(p[j].v);
  }

  static void values(const void* weights, int rows, const void* values, int token_panels, int64_t dv,
                     const float* factor, float* out) {
    for (int r = 0; r < rows; ++r)
      for (int64_t i = 0; i < dv; ++i) {
        const T* v = static_cast<const T*>(values) + i / kChannelPanel * kChannelPanel * kKeyBlock;
        const int16_t* p = static_cast<const int16_t*>(weights) + r * kKeyBlock;
        int32_t total = 0;
        for (int j = 0; j < token_panels * kTokenPanel; ++j)
          total += p[j] * v[j / kRun * kChannelPanel * kRun + i % kChannelPanel * kRun + j % kRun];
        out[r * dv + i] += static_cast<float>(total) * factor[r];
      }
  }
};

}  // namespace
}  // namespace tcompress::cpu

#include "attention_pack.h"
#include "attention_rows.h"
#include "short_attention_rows.h"

namespace tcompress::cpu {

const AttentionPath kAttentionScalar = {/*narrow_prefill=*/true,
                                        attend<Vec, Shorts, Tiles<int16_t>, true>,
                                        attend<Vec, Shorts, Tiles<int8_t>, false>,
                                        combine<Vec>,
                                        key_mean<Vec>,
                                        pack<Vec>,
                                        short_rows<Vec, 1>};

}  // namespace tcompress::cpu
