// Scale and integers of what has one range: tcompress/ops/quantize_per_token.py, bit for bit.
#pragma once

#include "platform.cuh"

namespace tcompress::cuda {

// A range is taken as at least this, so that a row of zeros is no special case.
constexpr float kMinRange = 0x1p-100f;

struct TokenScale {
  float scale, inverse, zero_point, low, high;

  // From the row's minimum (at most 0) and maximum (at least 0).
  __device__ __forceinline__ TokenScale(float lo, float hi, bool finite, int bits, bool symmetric) {
    const int q_max = symmetric ? (1 << (bits - 1)) - 1 : (1 << bits) - 1;
    const float step = ptx::divide(1.f, static_cast<float>(q_max));
    scale = symmetric ? ptx::multiply(ptx::maximum(-lo, hi), step)
                      : ptx::add(ptx::multiply(hi, step), -ptx::multiply(lo, step));
    scale = ptx::maximum(scale, ptx::multiply(kMinRange, step));
    inverse = finite ? ptx::divide(1.f, scale) : 0.f;
    zero_point = symmetric || !finite ? 0.f : ptx::round_half_even(ptx::multiply(-lo, inverse));
    if (!finite) scale = ptx::from_bits(0x7FC00000u);  // NaN
    low = symmetric ? static_cast<float>(-q_max) : 0.f;
    high = static_cast<float>(q_max);
  }

  __device__ __forceinline__ float integer(float x) const {
    const float q = ptx::add(ptx::round_half_even(ptx::multiply(x, inverse)), zero_point);
    return ptx::minimum(ptx::maximum(q, low), high);
  }
};

__device__ __forceinline__ bool is_finite(float x) { return (ptx::to_bits(x) & 0x7F800000u) != 0x7F800000u; }

}  // namespace tcompress::cuda
