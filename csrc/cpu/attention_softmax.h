// The softmax of one row of scores over a block of keys, as a template over a path's vectors of floats (vec_*.h) and of
// 16-bit integers:
//
//   struct Shorts {
//     static constexpr int kVecs;                        Vecs whose lanes fill one
//     static Shorts from_ticks(const Vec* ticks);        rounded half to even; below -32768 and NaN: -32768
//     static Shorts load(const int16_t*), set1(int16_t);
//     Shorts operator+, fraction(Shorts) = (x & 2047) << 4, mul_high(a, b) = (a*b + 2^14) >> 15,
//     power(Shorts ticks) = 2^(14 + (ticks >> 11)), 0 below 1;
//   };
//   int32_t sum(const Shorts*, n)                        of nonnegative lanes
#pragma once

#include <cstdint>

#include "attention_layout.h"

namespace tcompress::cpu {
namespace {

constexpr int kWeightBytes = kKeyBlock * 2;  // of a row of P'

constexpr float kTicks = 2048.f;                    // of an exponent of 2
constexpr float kTicksPerNat = 2954.639443740597f;  // of an exponent of e
constexpr float kLowest = -3.0e38f;                 // the maximum of no keys, as a number
constexpr float kLowestMask = -1.0e38f;             // finite mask entries are at least this
constexpr int16_t kExp2[3] = {11399, 3696, 1287};   // 2^x - 1 = x(c1 + x(c2 + x c3)) on [0, 1), units of 2^-14

// round(8192 * 2^(ticks / 2048)), ticks in [-32768, 0]
template <class H>
__attribute__((always_inline)) inline H exp2_ticks(H ticks) {
  const H x = fraction(ticks);
  H p = mul_high(x, H::set1(kExp2[2])) + H::set1(kExp2[1]);
  p = mul_high(x, p) + H::set1(kExp2[0]);
  p = mul_high(x, p) + H::set1(16384);
  return mul_high(p, power(ticks));
}

// 2^(ticks / 2048) for ticks <= 0, in products and sums alone: without fma, so that all paths round alike.
template <class V>
__attribute__((always_inline)) inline V exp2_exact(V ticks) {
  const V y = max(V::set1(-126.f), ticks * V::set1(1.f / kTicks));  // a NaN in the second argument survives
  const V n = round_even(y);
  const V x = y - n;
  V p = V::set1(0.00132847030f) * x;
  p = (p + V::set1(0.00967172813f)) * x;
  p = (p + V::set1(0.0555067807f)) * x;
  p = (p + V::set1(0.24022238f)) * x;
  p = (p + V::set1(0.693147004f)) * x;
  return (p + V::set1(1.f)) * exp2_integral(n);
}

// softcap * tanh(s / softcap); cap in ticks, factor = -2 / softcap
template <class V>
inline V soften(V s, float cap, float factor) {
  const V e = exp2_exact(abs(s) * V::set1(factor));  // e^(-2|s| / softcap)
  const V magnitude = (V::set1(1.f) - e) / (V::set1(1.f) + e) * V::set1(cap);
  return select_negative(s, V::set1(0.f) - magnitude, magnitude);
}

// Turns scaled scores of a block into P (Shorts of 64 lanes) and returns its sum.
template <class V, class H, int kVecs>
__attribute__((always_inline)) inline int32_t weights(const V (&s)[kVecs], float maximum, H (&p)[kVecs / H::kVecs]) {
  const V m = max(V::set1(maximum), V::set1(kLowest));
  V ticks[kVecs];
#pragma GCC unroll 64
  for (int i = 0; i < kVecs; ++i) ticks[i] = s[i] - m;
#pragma GCC unroll 64
  for (int i = 0; i < kVecs / H::kVecs; ++i) p[i] = exp2_ticks(H::from_ticks(ticks + i * H::kVecs));
  return sum(p);
}

}  // namespace
}  // namespace tcompress::cpu
