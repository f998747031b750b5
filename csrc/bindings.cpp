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

#include "cpu/int4_linear.h"
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

std::tuple<Tensor, Tensor, Tensor> quantize_per_token(const Tensor& x_in, int64_t bits, bool symmetric) {
  require(x_in.dim() >= 1, "quantize_per_token: x: expected at least 1 dimension");
  require(bits >= 2 && bits <= 8, "quantize_per_token: bits: expected 2 to 8");
  const Tensor x = dense(x_in);
  const DType dtype = float_dtype(x.scalar_type());
  Shape shape = shape_of(x);
  const int64_t k = shape.back(), m = rows_of(x);

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

const int8_t* int8_kernel_weight(const Tensor& kernel_weight, int64_t n, int64_t k) {
  require(k <= cpu::kMaxK, "int8_linear: K: expected at most 65536");
  require(kernel_weight.is_contiguous() && kernel_weight.scalar_type() == ScalarType::Char &&
              kernel_weight.numel() == cpu::Int8KernelLayout(n, k).bytes,
          "int8_linear: kernel_weight: expected the result of int8_prepack(weight)");
  return static_cast<const int8_t*>(kernel_weight.data_ptr());
}

Tensor int8_unpack(const Tensor& kernel_weight, int64_t n, int64_t k, const std::optional<Tensor>& rows_in) {
  require(n >= 0 && k >= 0, "int8_unpack: n, k: expected at least 0");
  const int8_t* source = int8_kernel_weight(kernel_weight, n, k);
  std::optional<Tensor> rows;
  if (rows_in.has_value()) {
    require(rows_in->dim() == 1 && rows_in->scalar_type() == ScalarType::Long, "int8_unpack: rows: expected int64 [R]");
    rows = dense(*rows_in);
    const int64_t* index = data_or_null<int64_t>(rows);
    for (int64_t i = 0; i < rows->numel(); ++i)
      require(index[i] >= 0 && index[i] < n, "int8_unpack: rows: expected indices from 0 to N - 1");
  }
  const int64_t n_rows = rows.has_value() ? rows->numel() : n;
  Tensor weight = torch::stable::new_empty(kernel_weight, {n_rows, k});
  cpu::int8_unpack(source, n, k, data_or_null<int64_t>(rows), n_rows, static_cast<int8_t*>(weight.data_ptr()),
                   threads());
  return weight;
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

  Input(const Tensor& x_in, std::optional<ScalarType> out_dtype) : x(dense(x_in)) {
    require(x.dim() >= 1, "tcompress: x: expected at least 1 dimension");
    k = x.size(x.dim() - 1);
    m = rows_of(x);
    shape = shape_of(x);
    y_type = out_dtype.value_or(x.scalar_type());
  }

  Tensor new_output(int64_t n) {
    shape.back() = n;
    return torch::stable::new_empty(x, shape, y_type);
  }
};

// Tensors that the raw views of an argument struct point into.
struct Operands {
  Tensor kernel_weight, weight_scale, y;
  std::optional<Tensor> bias, residual;
};

cpu::Int8LinearArgs int8_part(Input& in, const std::optional<Tensor>& weight, const Tensor& weight_scale,
                              const std::optional<Tensor>& bias, const std::optional<Tensor>& kernel_weight,
                              int64_t act_bits, bool act_symmetric, Activation activation,
                              const std::optional<Tensor>& residual, Operands& out) {
  const int64_t n = weight_scale.numel();
  require(!weight.has_value() || (weight->dim() == 2 && weight->scalar_type() == ScalarType::Char &&
                                  weight->size(0) == n && weight->size(1) == in.k),
          "int8_linear: weight: expected int8 [N, K] for x [..., K] and weight_scale [N]");
  require(weight.has_value() || kernel_weight.has_value(), "int8_linear: weight: expected it or kernel_weight");
  require(weight_scale.scalar_type() == ScalarType::Float && weight_scale.dim() == 1,
          "int8_linear: weight_scale: expected float32 [N]");
  check_act_bits(act_bits, act_symmetric);
  require(in.y_type != ScalarType::Int || !residual.has_value(), "int8_linear: residual: expected none for int32");
  out.weight_scale = dense(weight_scale);
  out.bias = float_bias(bias, n);
  out.kernel_weight = kernel_weight.has_value() ? *kernel_weight : int8_prepack(*weight);
  const int8_t* packed = int8_kernel_weight(out.kernel_weight, n, in.k);
  out.y = in.new_output(n);
  out.residual = checked_residual(residual, in.shape, in.y_type);
  return {in.x.data_ptr(),
          float_dtype(in.x.scalar_type()),
          in.m,
          n,
          in.k,
          packed,
          static_cast<const float*>(out.weight_scale.data_ptr()),
          data_or_null<float>(out.bias),
          static_cast<int>(act_bits),
          act_symmetric,
          activation,
          data_or_null<void>(out.residual),
          out.y.data_ptr(),
          in.y_type == ScalarType::Int ? DType::kInt32 : float_dtype(in.y_type)};
}

Tensor int8_linear(const Tensor& x, const std::optional<Tensor>& weight, const Tensor& weight_scale,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& kernel_weight, int64_t act_bits,
                   bool act_symmetric, const std::string& activation, std::optional<ScalarType> out_dtype,
                   const std::optional<Tensor>& residual) {
  Input in(x, out_dtype);
  Operands operands;
  cpu::int8_linear(int8_part(in, weight, weight_scale, bias, kernel_weight, act_bits, act_symmetric,
                             parse_activation(activation), residual, operands),
                   threads());
  return operands.y;
}

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

Tensors int8_multi_linear(const Tensor& x, const MaybeTensors& weights, const Tensors& weight_scales,
                          const MaybeTensors& biases, const MaybeTensors& kernel_weights, int64_t act_bits,
                          bool act_symmetric, const std::string& activation, bool gated,
                          std::optional<ScalarType> out_dtype) {
  check_parts(weight_scales.size(), weights.size(), biases.size(), kernel_weights.size(), gated);
  require(!gated || weight_scales[0].numel() == weight_scales[1].numel(), "int8_multi_linear: N: expected it alike");
  Input in(x, out_dtype);
  require(in.y_type != ScalarType::Int, "int8_multi_linear: out_dtype: expected a float type");
  std::vector<Operands> operands(weights.size());
  std::vector<cpu::Int8LinearArgs> parts;
  for (size_t i = 0; i < weights.size(); ++i)
    parts.push_back(int8_part(in, weights[i], weight_scales[i], biases[i], kernel_weights[i], act_bits, act_symmetric,
                              gated && i == 1 ? Activation::kNone : parse_activation(activation), std::nullopt,
                              operands[i]));
  cpu::int8_multi_linear(parts.data(), static_cast<int>(parts.size()), gated, threads());
  return results(operands, gated);
}

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

// Checks the parts of an int4 weight; returns its kernel layout.
cpu::Int4KernelLayout int4_layout(const std::optional<Tensor>& weight, const Tensor& scale,
                                  const std::optional<Tensor>& zero_point, int64_t k, int64_t group_size) {
  require(scale.dim() == 2, "int4_linear: weight_scale: expected [N, ceil(K/group_size)]");
  const int64_t n = scale.size(0);
  check_int4_sizes(n, k, group_size);
  const int64_t groups = k / group_size + (k % group_size != 0);
  require(scale.size(1) == groups, "int4_linear: weight_scale: expected [N, ceil(K/group_size)]");
  require(!weight.has_value() || (weight->dim() == 2 && weight->scalar_type() == ScalarType::Byte &&
                                  weight->size(0) == n && weight->size(1) == (k + 1) / 2),
          "int4_linear: weight: expected uint8 [N, ceil(K/2)]");
  require(!zero_point.has_value() || (zero_point->scalar_type() == ScalarType::Byte && zero_point->dim() == 2 &&
                                      zero_point->size(0) == n && zero_point->size(1) == groups),
          "int4_linear: zero_point: expected uint8, the shape of weight_scale");
  return {n, k, group_size, int4_scale_dtype(scale.scalar_type()), zero_point.has_value()};
}

Tensor int4_prepack(const Tensor& weight_in, const Tensor& scale_in, const std::optional<Tensor>& zero_point_in,
                    int64_t k, int64_t group_size) {
  const cpu::Int4KernelLayout layout = int4_layout(weight_in, scale_in, zero_point_in, k, group_size);
  const Tensor weight = dense(weight_in), scale = dense(scale_in);
  std::optional<Tensor> zero_point;
  if (zero_point_in.has_value()) zero_point = dense(*zero_point_in);
  Tensor packed = torch::stable::new_empty(weight, {layout.bytes}, ScalarType::Char);
  cpu::int4_prepack({static_cast<const uint8_t*>(weight.data_ptr()), weight.size(0), k, group_size, scale.data_ptr(),
                     int4_scale_dtype(scale.scalar_type()), data_or_null<uint8_t>(zero_point)},
                    static_cast<int8_t*>(packed.data_ptr()), threads());
  return packed;
}

const int8_t* int4_kernel_weight(const Tensor& kernel_weight, const cpu::Int4KernelLayout& layout) {
  require(kernel_weight.is_contiguous() && kernel_weight.scalar_type() == ScalarType::Char &&
              kernel_weight.numel() == layout.bytes,
          "int4_linear: kernel_weight: expected the result of int4_prepack");
  return static_cast<const int8_t*>(kernel_weight.data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> int4_unpack(const Tensor& kernel_weight, int64_t n, int64_t k, int64_t group_size,
                                               ScalarType scale_type, bool has_zero_points) {
  check_int4_sizes(n, k, group_size);
  const DType scale_dtype = int4_scale_dtype(scale_type);
  const cpu::Int4KernelLayout layout(n, k, group_size, scale_dtype, has_zero_points);
  const int8_t* source = int4_kernel_weight(kernel_weight, layout);
  const Shape groups = {n, layout.n_k_groups}, none = {0, 0};
  Tensor weight = torch::stable::new_empty(kernel_weight, {n, (k + 1) / 2}, ScalarType::Byte);
  Tensor scale = torch::stable::new_empty(kernel_weight, groups, scale_type);
  Tensor zero_point = torch::stable::new_empty(kernel_weight, has_zero_points ? groups : none, ScalarType::Byte);
  cpu::int4_unpack({source, n, k, group_size, scale_dtype, has_zero_points, static_cast<uint8_t*>(weight.data_ptr()),
                    scale.data_ptr(), static_cast<uint8_t*>(zero_point.data_ptr())},
                   threads());
  return {weight, scale, zero_point};
}

cpu::Int4LinearArgs int4_part(Input& in, const std::optional<Tensor>& weight, const Tensor& weight_scale,
                              const std::optional<Tensor>& zero_point, const std::optional<Tensor>& bias,
                              const std::optional<Tensor>& kernel_weight, int64_t group_size,
                              std::optional<int64_t> act_bits, bool act_symmetric, Activation activation,
                              const std::optional<Tensor>& residual, Operands& out) {
  const cpu::Int4KernelLayout layout = int4_layout(weight, weight_scale, zero_point, in.k, group_size);
  const int64_t n = weight_scale.size(0);
  require(weight.has_value() || kernel_weight.has_value(), "int4_linear: weight: expected it or kernel_weight");
  if (act_bits.has_value()) check_act_bits(*act_bits, act_symmetric);
  out.bias = float_bias(bias, n);
  out.kernel_weight =
      kernel_weight.has_value() ? *kernel_weight : int4_prepack(*weight, weight_scale, zero_point, in.k, group_size);
  const int8_t* packed = int4_kernel_weight(out.kernel_weight, layout);
  out.y = in.new_output(n);
  out.residual = checked_residual(residual, in.shape, in.y_type);
  return {in.x.data_ptr(),
          float_dtype(in.x.scalar_type()),
          in.m,
          n,
          in.k,
          group_size,
          packed,
          int4_scale_dtype(weight_scale.scalar_type()),
          zero_point.has_value(),
          data_or_null<float>(out.bias),
          static_cast<int>(act_bits.value_or(0)),
          act_symmetric,
          activation,
          data_or_null<void>(out.residual),
          out.y.data_ptr(),
          float_dtype(in.y_type)};
}

Tensor int4_linear(const Tensor& x, const std::optional<Tensor>& weight, const Tensor& weight_scale,
                   const std::optional<Tensor>& zero_point, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& kernel_weight, int64_t group_size, std::optional<int64_t> act_bits,
                   bool act_symmetric, const std::string& activation, std::optional<ScalarType> out_dtype,
                   const std::optional<Tensor>& residual) {
  Input in(x, out_dtype);
  Operands operands;
  cpu::int4_linear(int4_part(in, weight, weight_scale, zero_point, bias, kernel_weight, group_size, act_bits,
                             act_symmetric, parse_activation(activation), residual, operands),
                   threads());
  return operands.y;
}

Tensors int4_multi_linear(const Tensor& x, const MaybeTensors& weights, const Tensors& weight_scales,
                          const MaybeTensors& zero_points, const MaybeTensors& biases,
                          const MaybeTensors& kernel_weights, int64_t group_size, std::optional<int64_t> act_bits,
                          bool act_symmetric, const std::string& activation, bool gated,
                          std::optional<ScalarType> out_dtype) {
  check_parts(weight_scales.size(), weights.size(), biases.size(), kernel_weights.size(), gated);
  require(zero_points.size() == weights.size(), "int4_multi_linear: zero_points: expected as many as weights");
  for (const std::optional<Tensor>& zero_point : zero_points)
    require(zero_point.has_value() == zero_points[0].has_value(),
            "int4_multi_linear: zero_points: expected all of them or none");
  Input in(x, out_dtype);
  std::vector<Operands> operands(weights.size());
  std::vector<cpu::Int4LinearArgs> parts;
  for (size_t i = 0; i < weights.size(); ++i)
    parts.push_back(int4_part(
        in, weights[i], weight_scales[i], zero_points[i], biases[i], kernel_weights[i], group_size, act_bits,
        act_symmetric, gated && i == 1 ? Activation::kNone : parse_activation(activation), std::nullopt, operands[i]));
  require(!gated || parts[0].n == parts[1].n, "int4_multi_linear: N: expected it alike");
  cpu::int4_multi_linear(parts.data(), static_cast<int>(parts.size()), gated, threads());
  return results(operands, gated);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcompress, CPU, m) {
  m.impl("quantize_per_token", TORCH_BOX(&quantize_per_token));
  m.impl("int8_prepack", TORCH_BOX(&int8_prepack));
  m.impl("int8_unpack", TORCH_BOX(&int8_unpack));
  m.impl("int8_linear", TORCH_BOX(&int8_linear));
  m.impl("int4_prepack", TORCH_BOX(&int4_prepack));
  m.impl("int4_unpack", TORCH_BOX(&int4_unpack));
  m.impl("int8_multi_linear", TORCH_BOX(&int8_multi_linear));
  m.impl("int4_multi_linear", TORCH_BOX(&int4_multi_linear));
  m.impl("int4_linear", TORCH_BOX(&int4_linear));
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
