// Element types of the floating-point tensors that the kernels read and write.
#pragma once

#include <cstdint>

namespace tcompress::cpu {

enum class DType { kFloat32, kBFloat16, kFloat16, kInt32 };

// Storage only: a vector class converts to and from float32 (vec_*.h).
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
constexpr int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 || dtype == DType::kInt32 ? 4 : 2; }

static_assert(sizeof(BFloat16) == 2 && sizeof(Float16) == 2);

}  // namespace tcompress::cpu
