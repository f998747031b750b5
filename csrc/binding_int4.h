// What the bindings of int4 weights share. Include in csrc/bindings*.cpp alone.
#pragma once

#include "binding_tensors.h"
#include "cpu/int4_linear.h"

namespace {

DType int4_scale_dtype(ScalarType type) {
  require(type == ScalarType::Half || type == ScalarType::Float,
          "int4_linear: weight_scale: expected float16 or float32");
  return type == ScalarType::Half ? DType::kFloat16 : DType::kFloat32;
}

void check_int4_sizes(int64_t n, int64_t k, int64_t group_size) {
  require(n >= 0 && k >= 0, "int4_linear: N, K: expected at least 0");
  require(k <= cpu::kMaxInt4K, "int4_linear: K: expected at most 65536");
  const bool power = group_size >= 32 && group_size <= 512 && (group_size & (group_size - 1)) == 0;
  require(group_size > 0 && (power || group_size >= k),
          "int4_linear: group_size: expected 32, 64, 128, 256, 512 or at least K");
}

// Groups along K.
int64_t int4_groups(int64_t k, int64_t group_size) { return k / group_size + (k % group_size != 0); }

}  // namespace
