// What the bindings of the linear layers share. Include in csrc/bindings*.cpp alone.
#pragma once

#include "binding_tensors.h"
#include "cpu/activation_kind.h"

namespace {

using tcompress::cpu::Activation;

Activation parse_activation(const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  require(name == "silu", "int8_linear: activation: expected none, relu, gelu, gelu_tanh or silu");
  return Activation::kSilu;
}

// The product of all dimensions but the last: M.
int64_t rows_of(const Tensor& t) {
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) m *= t.size(i);
  return m;
}

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

// Of activations that are floats, or integers already (their type is then not used).
[[maybe_unused]] DType input_dtype(ScalarType type) {
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
[[maybe_unused]] Tensors results(const std::vector<Operands>& operands, bool gated) {
  Tensors y;
  for (size_t i = 0; i < (gated ? 1 : operands.size()); ++i) y.push_back(operands[i].y);
  return y;
}

[[maybe_unused]] void check_parts(size_t scales, size_t weights, size_t biases, size_t kernel_weights, bool gated) {
  require(scales >= 1 && weights == scales && biases == scales && kernel_weights == scales && (!gated || scales == 2),
          "multi_linear: weights: expected lists of one length, at least 1, and 2 where gated");
}

}  // namespace
