// Product of two results of linear layers on CUDA: the contract of gate.cuh. Free of torch.
#pragma once

#include <cstdint>

#include "../cpu/dtype.h"
#include "int8_linear.h"

namespace tcompress::cuda {

// y[i] *= gate[i], the product rounded once to y's type.
struct GateArgs {
  void* y;  // [count], contiguous
  cpu::DType type;
  const float* gate;  // [count]
  int64_t count;
};

void gate(const GateArgs& args, StreamHandle stream);

}  // namespace tcompress::cuda
