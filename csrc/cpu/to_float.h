// A row of any float type to float32, as a template over the vector class of a path (vec_*.h).
#pragma once

#include <cstdint>

#include "dtype.h"

namespace tcompress::cpu {
namespace {

template <class V, class T>
inline void row_to_float_typed(const T* x, int64_t n, float* out) {
  const int64_t body = n - n % V::kLanes;
  for (int64_t i = 0; i < body; i += V::kLanes) store(out + i, V::load(x + i));
  if (body == n) return;
  T tail[V::kLanes] = {};
  float converted[V::kLanes];
  for (int64_t i = body; i < n; ++i) tail[i - body] = x[i];
  store(converted, V::load(tail));
  for (int64_t i = body; i < n; ++i) out[i] = converted[i - body];
}

template <class V>
void row_to_float(const void* x, DType dtype, int64_t n, float* out) {
  switch (dtype) {
    case DType::kFloat32:
      return row_to_float_typed<V>(static_cast<const float*>(x), n, out);
    case DType::kBFloat16:
      return row_to_float_typed<V>(static_cast<const BFloat16*>(x), n, out);
    case DType::kFloat16:
      return row_to_float_typed<V>(static_cast<const Float16*>(x), n, out);
    case DType::kInt32:
      return;  // not an input type; the binding refuses it
  }
}

}  // namespace
}  // namespace tcompress::cpu
