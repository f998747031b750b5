// Rounding half to even without SSE4.1 or a library call. In an anonymous namespace: see vec_scalar.h.
#pragma once

#include <cstdint>

namespace tcompress::cpu {
namespace {

// The integer nearest to x, ties to even, for |x| < 2^22: at 1.5 * 2^23 a float32 has no bit left for a fraction, so
// the addition itself rounds.
inline float round_half_even(float x) {
  const float magic = 12582912.f;
  return (x + magic) - magic;
}

}  // namespace
}  // namespace tcompress::cpu
