// What the bindings share: checks, and tensors on their way to raw views. Include in csrc/bindings*.cpp alone: nothing
// under csrc/cpu knows torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/dtype.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name until torch 2.12
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace {

using tcompress::cpu::DType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace cpu = tcompress::cpu;

// The Python front end (tcompress/ops) raises ValueError and TypeError with hints before it comes here. These checks
// guard memory for callers that reach the dispatcher directly.
void require(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(message);
}

DType float_dtype(ScalarType type) {
  if (type == ScalarType::Float) return DType::kFloat32;
  if (type == ScalarType::BFloat16) return DType::kBFloat16;
  require(type == ScalarType::Half, "tcompress: x: expected float32, bfloat16 or float16");
  return DType::kFloat16;
}

using Shape = std::vector<int64_t>;

Shape shape_of(const Tensor& t) { return Shape(t.sizes().begin(), t.sizes().end()); }

template <class T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// An uninitialised tensor where `like` is. Straight to the allocator: torch::stable::new_empty takes a microsecond
// more.
[[maybe_unused]] Tensor empty_strided(const Tensor& like, const Shape& sizes, const Shape& strides, ScalarType type) {
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), code, aoti_torch_device_type_cpu(),
                                                         like.get_device_index(), &handle));
  return Tensor(handle);
}

int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

}  // namespace
