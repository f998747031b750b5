// What follows the sums of a linear layer: warps that shared k meet, then scales, bias, activation, residual, and one
// rounding.
//
// Written once for eight neighbours of a row and run in a loop that is not unrolled: five activations in four output
// types would otherwise be copied for every accumulator.
#pragma once

#include <type_traits>

#include "elements.cuh"
#include "int8_linear.h"

namespace tcompress::cuda {

using cpu::Activation;

__device__ __forceinline__ float activate(float y, Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      return y < 0.f ? 0.f : y;  // a maximum would lose NaN
    case Activation::kGelu:
      return 0.5f * y * (1.f + erff(y * 0.70710678f));
    case Activation::kGeluTanh:
      return 0.5f * y * (1.f + tanhf(0.79788456f * (y + 0.044715f * y * y * y)));
    case Activation::kSilu:
      return y / (1.f + expf(-y));
    default:
      return y;
  }
}

// Bias, activation, residual and the one rounding, of row m and columns n to n + 7, of which those below N are stored.
// `args` of any layer: bias, activation, residual, y, y_type, n. Vectors where N is a multiple of eight.
template <class Args>
__device__ __forceinline__ void finish_floats(const Args& args, int64_t m, int64_t n, float (&y)[kVector]) {
  const int count = args.n - n < kVector ? static_cast<int>(args.n - n) : kVector;
  const int64_t at = m * args.n + n;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const bool inside = i < count;
    if (args.bias != nullptr) y[i] = ptx::add(y[i], inside ? args.bias[n + i] : 0.f);
    y[i] = activate(y[i], args.activation);
    if (args.residual != nullptr && inside) y[i] = ptx::add(y[i], load_element(args.residual, args.y_type, at + i));
  }
  store_vector(args.y, args.y_type, at, y, count, args.n % kVector == 0);
}

// The same of int8's sums.
__device__ __forceinline__ void finish(const Int8LinearArgs& args, int64_t m, int64_t n, int32_t (&acc)[kVector]) {
  const int count = args.n - n < kVector ? static_cast<int>(args.n - n) : kVector;
  if (args.zero_point != nullptr) {
    const int32_t zero = args.zero_point[m];
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (i < count) acc[i] -= zero * args.weight_sum[n + i];
  }
  if (args.y_type == DType::kInt32) {
    int32_t* y = static_cast<int32_t*>(args.y) + m * args.n + n;
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (i < count) ptx::store_global(y + i, acc[i]);
    return;
  }
  const float scale = args.scale[m];
  float y[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    y[i] = ptx::multiply(ptx::multiply(ptx::to_float(acc[i]), scale), i < count ? args.weight_scale[n + i] : 0.f);
  finish_floats(args, m, n, y);
}

// The sums of a block, kRows tokens by kColumns channels, which Tile::WK groups of warps have left in shared memory,
// one behind the other, each where Tile::sum_at says; int32_t, or float with their scales. For all threads, after a
// barrier.
template <class Sum, class Tile, int kRows, int kColumns, class Args>
__device__ __forceinline__ void finish_block(const Args& args, ptx::SharedPtr shared, int64_t m0, int64_t n0) {
  constexpr int kVectors = kColumns / kVector;
#pragma unroll 1
  for (int v = threadIdx.x; v < kRows * kVectors; v += Tile::kThreads) {
    const int row = v / kVectors, column = v % kVectors * kVector;
    const int64_t m = m0 + row, n = n0 + column;
    if (m >= args.m || n >= args.n) continue;
    Sum sum[kVector] = {};
#pragma unroll
    for (int part = 0; part < Tile::WK; ++part)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const ptx::SharedPtr at = shared + part * (kRows * kColumns * 4) + Tile::sum_at(row, column) + half * 16;
        const ptx::Words4 w = ptx::load_shared<ptx::Words4>(at);
        const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (std::is_same<Sum, float>::value)
            sum[half * 4 + i] += ptx::from_bits(words[i]);
          else
            sum[half * 4 + i] += static_cast<int32_t>(words[i]);
        }
      }
    if constexpr (std::is_same<Sum, float>::value)
      finish_floats(args, m, n, sum);
    else
      finish(args, m, n, sum);
  }
}

}  // namespace tcompress::cuda
