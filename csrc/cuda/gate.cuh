// Product of two results of linear layers, in place: a thread takes eight neighbours.
#pragma once

#include "elements.cuh"
#include "gate.h"

namespace tcompress::cuda {

constexpr int kGateThreads = 256;

__global__ void __launch_bounds__(kGateThreads) gate_kernel(const __grid_constant__ GateArgs args) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kGateThreads + threadIdx.x) * kVector;
  if (first >= args.count) return;
  const int count = args.count - first < kVector ? static_cast<int>(args.count - first) : kVector;
  float y[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    y[i] = i < count ? ptx::multiply(load_element(args.y, args.type, first + i), args.gate[first + i]) : 0.f;
  store_vector(args.y, args.type, first, y, count, true);
}

inline void run_gate(const GateArgs& args, Stream stream) {
  if (args.count == 0) return;
  const int64_t blocks = ceil_div<int64_t>(args.count, static_cast<int64_t>(kGateThreads) * kVector);
  launch("gate", gate_kernel, {static_cast<unsigned>(blocks)}, kGateThreads, 0, stream, args);
}

}  // namespace tcompress::cuda
