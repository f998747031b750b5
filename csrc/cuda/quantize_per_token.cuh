// Tokens to integers, a scale each: tcompress/ops/quantize_per_token.py, bit for bit.
//
//   x [M, K] float     q [M, ldq] int8 or uint8    scale [M]    zero_point [M]
//   one block a row; a thread takes vectors of eight, kThreads vectors apart
//
//  1. Range of the row: minimum with 0, maximum with 0, and whether all is finite.
//  2. Scale and zero point, from it alone: every thread computes them, and they round as in the reference (no fused
//     multiply-add, correctly rounded division).
//  3. The row again, out of the cache: round half to even, clamp, store.
//
// Constraints: K of any size; vectors where K is a multiple of eight and x lies on 16 bytes. Not measured on a GPU.
#pragma once

#include "elements.cuh"
#include "quantize_per_token.h"
#include "reduce.cuh"
#include "token_scale.cuh"

namespace tcompress::cuda {

constexpr int kRowThreads = 128;
constexpr uint32_t kRowScratchBytes = kRowThreads / kWarpSize * 4;
// Elements first to first + 7 of a row, zeros beyond K.
__device__ __forceinline__ void load_row(const QuantizeArgs& args, int64_t row, int64_t first, bool vectors,
                                         float (&x)[kVector]) {
  if (vectors) return load_vector(args.x, args.type, row * args.k + first, x);
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    x[i] = first + i < args.k ? load_element(args.x, args.type, row * args.k + first + i) : 0.f;
}

__global__ void __launch_bounds__(kRowThreads) quantize_per_token_kernel(const __grid_constant__ QuantizeArgs args) {
  const int64_t row = blockIdx.x;
  const bool vectors = args.k % kVector == 0 && reinterpret_cast<uintptr_t>(args.x) % 16 == 0;
  const int64_t end = TC_PLANTED(kOffByOne) ? args.k - 1 : args.k;

  // 1.
  float lo = 0.f, hi = 0.f;
  int32_t bad = 0;
  for (int64_t first = threadIdx.x * kVector; first < end; first += kRowThreads * kVector) {
    float x[kVector];
    load_row(args, row, first, vectors, x);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      lo = ptx::minimum(lo, x[i]), hi = ptx::maximum(hi, x[i]);
      bad |= !is_finite(x[i]);
    }
  }
  const ptx::SharedPtr scratch = ptx::shared_base();
  lo = -reduce_block<kRowThreads>(-lo, Maximum(), scratch);
  hi = reduce_block<kRowThreads>(hi, Maximum(), scratch);
  bad = reduce_block<kRowThreads>(bad, Maximum(), scratch);

  // 2.
  const TokenScale token(lo, hi, bad == 0, args.bits, args.symmetric);
  if (threadIdx.x == 0) {
    args.scale[row] = token.scale;
    if (args.zero_point != nullptr) args.zero_point[row] = ptx::to_int(token.zero_point);
  }

  // 3.
  const float shift = args.centred ? token.zero_point : 0.f;
  int8_t* out = static_cast<int8_t*>(args.q) + row * args.ldq;
  const bool stores = vectors && args.ldq % kVector == 0 && reinterpret_cast<uintptr_t>(args.q) % kVector == 0;
  for (int64_t first = threadIdx.x * kVector; first < end; first += kRowThreads * kVector) {
    float x[kVector];
    load_row(args, row, first, vectors, x);
    uint32_t words[2] = {};
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float q = token.integer(bad == 0 ? x[i] : 0.f) - shift;
      words[i / 4] |= (static_cast<uint32_t>(ptx::to_int(q)) & 0xFF) << (i % 4 * 8);
    }
    if (stores) {
      ptx::store_global(out + first, ptx::Words2{words[0], words[1]});
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (first + i < args.k) out[first + i] = static_cast<int8_t>(words[i / 4] >> (i % 4 * 8));
    }
  }
  for (int64_t i = args.k + threadIdx.x; i < args.ldq; i += kRowThreads) out[i] = 0;
}

__global__ void __launch_bounds__(kRowThreads)
    row_sums_kernel(const int8_t* weight, int64_t k, int64_t stride, int32_t* sums) {
  const int8_t* row = weight + static_cast<int64_t>(blockIdx.x) * stride;
  int32_t sum = 0;
  for (int64_t i = threadIdx.x; i < k; i += kRowThreads) sum += row[i];
  sum = reduce_block<kRowThreads>(sum, Sum(), ptx::shared_base());
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kRowThreads)
    pad_rows_kernel(const int8_t* from, int64_t k, int8_t* to, int64_t stride) {
  const int64_t row = blockIdx.x;
  for (int64_t i = threadIdx.x; i < stride; i += kRowThreads) to[row * stride + i] = i < k ? from[row * k + i] : 0;
}

inline void run_quantize_per_token(const QuantizeArgs& args, Stream stream) {
  if (args.m == 0) return;
  launch("quantize_per_token", quantize_per_token_kernel, {static_cast<unsigned>(args.m)}, kRowThreads,
         kRowScratchBytes, stream, args);
}

inline void run_row_sums(const int8_t* weight, int64_t n, int64_t k, int64_t stride, int32_t* sums, Stream stream) {
  if (n == 0) return;
  launch("row_sums", row_sums_kernel, {static_cast<unsigned>(n)}, kRowThreads, kRowScratchBytes, stream, weight, k,
         stride, sums);
}

inline void run_pad_rows(const int8_t* from, int64_t rows, int64_t k, int8_t* to, int64_t stride, Stream stream) {
  if (rows == 0) return;
  launch("pad_rows", pad_rows_kernel, {static_cast<unsigned>(rows)}, kRowThreads, 0, stream, from, k, to, stride);
}

}  // namespace tcompress::cuda
