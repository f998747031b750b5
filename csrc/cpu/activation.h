// Activation functions as templates over the vector class of a path (vec_*.h).
//
// The polynomials are minimax fits (relative error in exact arithmetic beside each); accuracy against float64 is tested
// to be within a small factor of torch's own float32 functions.
#pragma once

#include "activation_kind.h"

namespace tcompress::cpu {
namespace {

// An activation as a type, so that a generic lambda can take it as a constant.
template <Activation kActivation>
struct ActivationConstant {
  static constexpr Activation value = kActivation;
};

// e^x for x clamped to [-87.3, 88.8]: never subnormal, and infinity from 88.38 (n = 128), so that a sigmoid reaches 0
// and not a 4e-39 that a large x would multiply. NaN propagates.
template <class V>
inline V exp_clamped(V x) {
  x = max(V::set1(-87.3f), min(V::set1(88.8f), x));
  const V n = round_even(x * V::set1(1.44269504f));
  // Cody-Waite: ln 2 in two parts, the first exact in few bits, so that n*ln2_hi has no rounding error.
  const V r = fma(n, V::set1(2.12194440e-4f), fma(n, V::set1(-0.693359375f), x));
  // e^r = 1 + r + r^2 Q(r) on |r| <= ln(2)/2, error 3.1e-9
  V q = V::set1(0.0013814468402415514f);
  q = fma(q, r, V::set1(0.008368780836462975f));
  q = fma(q, r, V::set1(0.04166839271783829f));
  q = fma(q, r, V::set1(0.1666651964187622f));
  q = fma(q, r, V::set1(0.4999999403953552f));
  return fma(q * r, r, r + V::set1(1.f)) * exp2_integral(n);
}

template <class V>
inline V sigmoid(V x) {
  return V::set1(1.f) / (V::set1(1.f) + exp_clamped(V::set1(0.f) - x));
}

template <class V>
inline V silu(V x) {
  return x * sigmoid(x);
}

// x/2 (1 + tanh z) = x sigmoid(2z), z = sqrt(2/pi) (x + 0.044715 x^3)
template <class V>
inline V gelu_tanh(V x) {
  const V cubic = fma(x * x * x, V::set1(0.044715f), x);
  return x * sigmoid(V::set1(1.5957691216f) * cubic);
}

// x/2 (1 + erf(x/sqrt 2)) = x (1 - h) for x >= 0 and x h for x < 0, h = erfc(|x|/sqrt 2)/2: no cancellation on the
// left.
template <class V>
inline V gelu_erf(V x) {
  const V u = abs(x) * V::set1(0.70710678f);
  const V t = V::set1(1.f) / fma(u, V::set1(0.4f), V::set1(1.f));
  // erfc(u)/2 = e^(-u^2) t P(t), t = 1/(1 + 0.4 u), error 8.8e-8 on [0, 14]
  V p = V::set1(0.022984011098742485f);
  p = fma(p, t, V::set1(-0.08152922987937927f));
  p = fma(p, t, V::set1(0.06524835526943207f));
  p = fma(p, t, V::set1(0.017717527225613594f));
  p = fma(p, t, V::set1(0.05773438513278961f));
  p = fma(p, t, V::set1(0.0892399474978447f));
  p = fma(p, t, V::set1(0.1028052270412445f));
  p = fma(p, t, V::set1(0.11296837776899338f));
  p = fma(p, t, V::set1(0.11283144354820251f));
  const V h = p * t * exp_clamped(V::set1(0.f) - u * u);
  return select_negative(x, x * h, x * (V::set1(1.f) - h));
}

template <Activation kActivation, class V>
inline V activate(V x) {
  if constexpr (kActivation == Activation::kRelu) return max(V::set1(0.f), x);
  if constexpr (kActivation == Activation::kGelu) return gelu_erf(x);
  if constexpr (kActivation == Activation::kGeluTanh) return gelu_tanh(x);
  if constexpr (kActivation == Activation::kSilu) return silu(x);
  return x;
}

}  // namespace
}  // namespace tcompress::cpu
