// The only CPU file that includes torch: check tensors > raw view > call.
//
// Two doors: the kernels are registered with torch's dispatcher through its stable ABI (schemas are defined in Python,
// tcompress/ops), and a pybind11 module answers questions about the host (tcompress/backend.py).

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/int8_linear.h"
#include "cpu/path.h"
#include "cpu/quantize_per_token.h"

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

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

std::tuple<Tensor, Tensor, Tensor> quantize_per_token(const Tensor& x_in, int64_t bits, bool symmetric) {
  require(x_in.dim() >= 1, "quantize_per_token: x: expected at least 1 dimension");
  require(bits >= 2 && bits <= 8, "quantize_per_token: bits: expected 2 to 8");
  const Tensor x = dense(x_in);
  const DType dtype = float_dtype(x.scalar_type());
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  const int64_t k = shape.back();
  int64_t m = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) m *= shape[i];

  Tensor q = torch::stable::new_empty(x, shape, symmetric ? ScalarType::Char : ScalarType::Byte);
  shape.back() = 1;
  Tensor scale = torch::stable::new_empty(x, shape, ScalarType::Float);
  Tensor zero_point = torch::stable::new_empty(x, shape, ScalarType::Int);
  cpu::quantize_per_token(
      {x.data_ptr(), dtype, m, k, static_cast<int>(bits), symmetric, static_cast<uint8_t*>(q.data_ptr()),
       static_cast<float*>(scale.data_ptr()), static_cast<int32_t*>(zero_point.data_ptr())},
      threads());
  return {q, scale, zero_point};
}

Tensor int8_prepack(const Tensor& weight_in) {
  require(weight_in.dim() == 2 && weight_in.scalar_type() == ScalarType::Char,
          "int8_prepack: weight: expected a 2-d int8 tensor");
  const Tensor weight = dense(weight_in);
  const int64_t n = weight.size(0), k = weight.size(1);
  Tensor packed = torch::stable::new_empty(weight, {cpu::Int8KernelLayout(n, k).bytes});
  cpu::int8_prepack(static_cast<const int8_t*>(weight.data_ptr()), n, k, static_cast<int8_t*>(packed.data_ptr()),
                    threads());
  return packed;
}

Tensor int8_linear(const Tensor& x_in, const Tensor& weight, const Tensor& weight_scale_in,
                   const std::optional<Tensor>& bias_in, const std::optional<Tensor>& kernel_weight_in,
                   int64_t act_bits, bool act_symmetric, const std::string& activation,
                   std::optional<ScalarType> out_dtype) {
  require(x_in.dim() >= 1 && weight.dim() == 2 && x_in.size(x_in.dim() - 1) == weight.size(1),
          "int8_linear: x: expected [..., K] for a weight [N, K]");
  require(weight.scalar_type() == ScalarType::Char, "int8_linear: weight: expected int8");
  const int64_t n = weight.size(0), k = weight.size(1);
  require(k <= cpu::kMaxK, "int8_linear: K: expected at most 65536");
  require(act_bits >= 2 && act_bits <= (act_symmetric ? 8 : 7),
          "int8_linear: act_bits: expected 2 to 8 symmetric or 2 to 7 asymmetric");
  const Tensor x = dense(x_in);
  const Tensor weight_scale = dense(weight_scale_in);
  require(weight_scale.scalar_type() == ScalarType::Float && weight_scale.numel() == n,
          "int8_linear: weight_scale: expected float32 [N]");
  std::optional<Tensor> bias;
  if (bias_in.has_value()) {
    // A float32 bias, whatever the type of x: the sum it is added to is float32 too.
    bias =
        dense(bias_in->scalar_type() == ScalarType::Float ? *bias_in : torch::stable::to(*bias_in, ScalarType::Float));
    require(bias->numel() == n, "int8_linear: bias: expected [N]");
  }
  const Tensor kernel_weight = kernel_weight_in.has_value() ? *kernel_weight_in : int8_prepack(weight);
  require(kernel_weight.is_contiguous() && kernel_weight.scalar_type() == ScalarType::Char &&
              kernel_weight.numel() == cpu::Int8KernelLayout(n, k).bytes,
          "int8_linear: kernel_weight: expected the result of int8_prepack(weight)");

  const ScalarType y_type = out_dtype.value_or(x.scalar_type());
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  int64_t m = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) m *= shape[i];
  shape.back() = n;
  Tensor y = torch::stable::new_empty(x, shape, y_type);
  cpu::int8_linear(
      {x.data_ptr(), float_dtype(x.scalar_type()), m, n, k, static_cast<const int8_t*>(kernel_weight.data_ptr()),
       static_cast<const float*>(weight_scale.data_ptr()),
       bias.has_value() ? static_cast<const float*>(bias->data_ptr()) : nullptr, static_cast<int>(act_bits),
       act_symmetric, parse_activation(activation), y.data_ptr(),
       y_type == ScalarType::Int ? DType::kInt32 : float_dtype(y_type)},
      threads());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcompress, CPU, m) {
  m.impl("quantize_per_token", TORCH_BOX(&quantize_per_token));
  m.impl("int8_prepack", TORCH_BOX(&int8_prepack));
  m.impl("int8_linear", TORCH_BOX(&int8_linear));
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Host functions of tcompress: CPU paths and threads. The kernels are torch ops, torch.ops.tcompress.*";
  m.def("all_paths", [] {
    std::vector<std::string> names;
    for (cpu::Path path : cpu::kAllPaths) names.emplace_back(cpu::path_name(path));
    return names;
  });
  m.def(
      "why_not_usable",
      [](const std::string& name) {
        for (cpu::Path path : cpu::kAllPaths)
          if (name == cpu::path_name(path)) return cpu::why_not_usable(path);
        throw std::invalid_argument("cpu path: name: got '" + name + "', expected one of _C.all_paths()");
      },
      "Empty when the path can run here, else the reason why not.");
  m.def("current_path", [] { return std::string(cpu::path_name(cpu::current_path())); });
  m.def("forced_path", &cpu::forced_path, "The forced path, or an empty string.");
  m.def("force_path", &cpu::force_path, "Forces a path by name; an empty name returns to the automatic choice.");
  m.def("num_threads", &threads, "Threads that the kernels use: torch.get_num_threads().");
}
