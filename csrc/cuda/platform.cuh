// The one door through which a kernel file sees its machine: nvcc and a GPU, or g++ and the emulation in
// tests/gpu/shim, which has the same names. Kernels use the tensor cores, shared memory and cp.async only through
// ptx.cuh, so that the same text runs on both.
#pragma once

#if defined(TCOMPRESS_CUDA_ON_CPU)
#include "cuda_on_cpu.h"
#else

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

// Where a test plants a bug into the emulated kernel, to see that it is caught.
#define TC_PLANTED(bug) false

namespace tcompress::cuda {

using Stream = cudaStream_t;

struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

// Launches without waiting: nothing here synchronizes or allocates, so it can be captured in a CUDA graph.
// Raises std::runtime_error with `name` where CUDA refuses.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, int threads, uint32_t shared_bytes,
            Stream stream, Arguments... arguments) {
  constexpr uint32_t kSharedWithoutAsking = 48 * 1024;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kSharedWithoutAsking)
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(grid.x, grid.y, grid.z);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": launch: " + cudaGetErrorString(error));
}

}  // namespace tcompress::cuda

#include "ptx.cuh"

#endif

namespace tcompress::cuda {

constexpr int kWarpSize = 32;

template <class T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace tcompress::cuda
