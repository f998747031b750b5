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

#include "cpu/activation_kind.h"
#include "cpu/dtype.h"

namespace {

using tcompress::cpu::Activation;
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

Activation parse_activation(const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  require(name == "silu", "int8_linear: activation: expected none, relu, gelu, gelu_tanh or silu");
  return Activation::kSilu;
}

using Shape = std::vector<int64_t>;

Shape shape_of(const Tensor& t) { return Shape(t.sizes().begin(), t.sizes().end()); }

// The product of all dimensions but the last: M.
int64_t rows_of(const Tensor& t) {
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) m *= t.size(i);
  return m;
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// A float32 bias, whatever the type of x: the sum it is added to is float32 too.
std::optional<Tensor> float_bias(const std::optional<Tensor>& bias, int64_t n) {
  if (!bias.has_value()) return std::nullopt;
  require(bias->numel() == n, "tcompress: bias: expected [N]");
  return dense(bias->scalar_type() == ScalarType::Float ? *bias : torch::stable::to(*bias, ScalarType::Float));
}

// [..., N] like the output, of its type.
std::optional<Tensor> checked_residual(const std::optional<Tensor>& residual, const Shape& shape, ScalarType type) {
  if (!residual.has_value()) return std::nullopt;
  require(residual->scalar_type() == type && shape_of(*residual) == shape,
          "tcompress: residual: expected the shape and the type of the result");
  return dense(*residual);
}

int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

// Of activations that are floats, or integers already (their type is then not used).
DType input_dtype(ScalarType type) {
  return type == ScalarType::Char || type == ScalarType::Byte ? DType::kInt32 : float_dtype(type);
}

void check_act_bits(int64_t bits, bool symmetric) {
  require(bits >= 2 && bits <= (symmetric ? 8 : 7),
          "tcompress: act_bits: expected 2 to 8 symmetric or 2 to 7 asymmetric");
}

// What every part of a multi-linear call shares.
struct Input {
  Tensor x;
  int64_t k, m;
  Shape shape;  // of the result, but for its last dimension
  ScalarType y_type;
  int64_t y_rows = -1;  // 0: no output is made, only its shape

  Input(const Tensor& x_in, std::optional<ScalarType> out_dtype) : x(dense(x_in)) {
    require(x.dim() >= 1, "tcompress: x: expected at least 1 dimension");
    k = x.size(x.dim() - 1);
    m = rows_of(x);
    shape = shape_of(x);
    y_type = out_dtype.value_or(x.scalar_type());
  }

  Tensor new_output(int64_t n) {
    shape.back() = n;
    return y_rows == 0 ? torch::stable::new_empty(x, {0}, y_type) : torch::stable::new_empty(x, shape, y_type);
  }
};

// Tensors that the raw views of an argument struct point into.
struct Operands {
  Tensor kernel_weight, weight_scale, y;
  std::optional<Tensor> bias, residual;
};

using Tensors = std::vector<Tensor>;
using MaybeTensors = std::vector<std::optional<Tensor>>;

// The results of all parts, or of the first where it is gated by the second.
Tensors results(const std::vector<Operands>& operands, bool gated) {
  Tensors y;
  for (size_t i = 0; i < (gated ? 1 : operands.size()); ++i) y.push_back(operands[i].y);
  return y;
}

void check_parts(size_t scales, size_t weights, size_t biases, size_t kernel_weights, bool gated) {
  require(scales >= 1 && weights == scales && biases == scales && kernel_weights == scales && (!gated || scales == 2),
          "multi_linear: weights: expected lists of one length, at least 1, and 2 where gated");
}

}  // namespace
