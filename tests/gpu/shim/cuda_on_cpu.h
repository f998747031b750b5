// What a kernel needs of CUDA, for g++: the words of the language, launches, and (ptx_on_cpu.h) the instructions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (shim::current->thread)
#define blockIdx (shim::block_index)
#define blockDim (shim::block_size)
#define gridDim (shim::grid_size)

// True where the test has planted this bug; nvcc's form is the constant false.
#define TC_PLANTED(bug) (shim::planted == shim::Bug::bug)

namespace tcompress::cuda {

using Stream = void*;

struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

constexpr int kMaxThreads = 1024;
constexpr uint32_t kMaxSharedBytes = 99 * 1024;  // of 8.6, 8.9 and 12.0; 8.0 and 9.0 have more

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, int threads, uint32_t shared_bytes, Stream,
            Arguments... arguments) {
  if (threads < 1 || threads > kMaxThreads || shared_bytes > kMaxSharedBytes || grid.x == 0 || grid.y == 0 ||
      grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error(std::string(name) + ": a launch that CUDA refuses");
  shim::run([=] { kernel(arguments...); }, {grid.x, grid.y, grid.z}, threads, shared_bytes);
}

}  // namespace tcompress::cuda

#include "ptx_on_cpu.h"
