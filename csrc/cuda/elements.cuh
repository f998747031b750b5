// Float tensors of a type known at run time: eight elements at a time, to float32 and back.
#pragma once

#include "../cpu/dtype.h"
#include "platform.cuh"

namespace tcompress::cuda {

using cpu::DType;

constexpr int kVector = 8;  // elements: 16 bytes of a 16-bit type, 32 of a 32-bit one

__host__ __device__ constexpr int bytes_of(DType type) {
  return type == DType::kFloat32 || type == DType::kInt32 ? 4 : 2;
}

__device__ __forceinline__ const char* element_at(const void* p, DType type, int64_t i) {
  return static_cast<const char*>(p) + i * bytes_of(type);
}
__device__ __forceinline__ char* element_at(void* p, DType type, int64_t i) {
  return static_cast<char*>(p) + i * bytes_of(type);
}

// One element, any alignment that the type allows.
__device__ __forceinline__ float load_element(const void* p, DType type, int64_t i) {
  const char* at = element_at(p, type, i);
  if (type == DType::kFloat32) return ptx::load_global<float>(at);
  const uint16_t bits = ptx::load_global<uint16_t>(at);
  return type == DType::kFloat16 ? ptx::half_to_float(bits) : ptx::bfloat16_to_float(bits);
}

// Element kVector · i and the following; aligned to 16 bytes.
__device__ __forceinline__ void load_vector(const void* p, DType type, int64_t first, float (&x)[kVector]) {
  const char* at = element_at(p, type, first);
  if (type == DType::kFloat32) {
    for (int half = 0; half < 2; ++half) {
      const ptx::Words4 w = ptx::load_global<ptx::Words4>(at + 16 * half);
      x[4 * half] = ptx::from_bits(w.x), x[4 * half + 1] = ptx::from_bits(w.y);
      x[4 * half + 2] = ptx::from_bits(w.z), x[4 * half + 3] = ptx::from_bits(w.w);
    }
    return;
  }
  const ptx::Words4 w = ptx::load_global<ptx::Words4>(at);
  const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const uint16_t bits = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
    x[i] = type == DType::kFloat16 ? ptx::half_to_float(bits) : ptx::bfloat16_to_float(bits);
  }
}

// The first `count` of x, rounded once; vector stores where `aligned` and whole.
__device__ __forceinline__ void store_vector(void* p, DType type, int64_t first, const float (&x)[kVector], int count,
                                             bool aligned) {
  char* at = element_at(p, type, first);
  if (type == DType::kFloat32) {
    if (aligned && count == kVector) {
      for (int half = 0; half < 2; ++half)
        ptx::store_global(at + 16 * half, ptx::Words4{ptx::to_bits(x[4 * half]), ptx::to_bits(x[4 * half + 1]),
                                                      ptx::to_bits(x[4 * half + 2]), ptx::to_bits(x[4 * half + 3])});
      return;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (i < count) ptx::store_global(at + 4 * i, x[i]);
    return;
  }
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    words[i] =
        type == DType::kFloat16 ? ptx::pack_half(x[2 * i], x[2 * i + 1]) : ptx::pack_bfloat16(x[2 * i], x[2 * i + 1]);
  if (aligned && count == kVector) {
    ptx::store_global(at, ptx::Words4{words[0], words[1], words[2], words[3]});
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    if (i < count) ptx::store_global(at + 2 * i, static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16)));
}

}  // namespace tcompress::cuda
