// Reductions over a warp and over a block.
#pragma once

#include "platform.cuh"

namespace tcompress::cuda {

struct Maximum {
  __device__ __forceinline__ float operator()(float a, float b) const { return ptx::maximum(a, b); }
  __device__ __forceinline__ int32_t operator()(int32_t a, int32_t b) const { return a > b ? a : b; }
};
struct Sum {
  __device__ __forceinline__ int32_t operator()(int32_t a, int32_t b) const { return a + b; }
  __device__ __forceinline__ float operator()(float a, float b) const { return ptx::add(a, b); }
};

// All lanes get the result.
template <class T, class Operation>
__device__ __forceinline__ T reduce_warp(T value, Operation operation) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
    value = operation(value, ptx::shuffle_xor(value, distance));
  return value;
}

// All threads get the result. `scratch`: 4 bytes of shared memory a warp, free before and after.
template <int kThreads, class T, class Operation>
__device__ __forceinline__ T reduce_block(T value, Operation operation, ptx::SharedPtr scratch) {
  static_assert(sizeof(T) == 4 && kThreads % kWarpSize == 0);
  value = reduce_warp(value, operation);
  if (threadIdx.x % kWarpSize == 0) ptx::store_shared(scratch + threadIdx.x / kWarpSize * 4, value);
  if (!TC_PLANTED(kMissingBarrier)) ptx::barrier();
  value = ptx::load_shared<T>(scratch);
#pragma unroll
  for (int w = 1; w < kThreads / kWarpSize; ++w) value = operation(value, ptx::load_shared<T>(scratch + w * 4));
  ptx::barrier();
  return value;
}

}  // namespace tcompress::cuda
