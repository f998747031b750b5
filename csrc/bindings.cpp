// With bindings_int4.cpp the only CPU files that include torch: check tensors > raw view > call.
//
// Two doors: the kernels are registered with torch's dispatcher through its stable ABI (schemas are defined in Python,
// tcompress/ops), and a pybind11 module answers questions about the host (tcompress/backend.py).

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "binding_linear.h"
#include "cpu/int8_linear.h"
#include "cpu/path.h"
#include "cpu/quantize_per_token.h"

namespace {

using Quantized = std::tuple<Tensor, Tensor, Tensor>;

Quantized quantized(const Tensor& x_in, int64_t bits, bool symmetric, const cpu::FixedScale* fixed) {
  require(x_in.dim() >= 1, "quantize: x: expected at least 1 dimension");
  require(bits >= 2 && bits <= 8, "quantize: bits: expected 2 to 8");
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
       static_cast<float*>(scale.data_ptr()), static_cast<int32_t*>(zero_point.data_ptr()), fixed},
      threads());
  return {q, scale, zero_point};
}

Quantized quantize_per_token(const Tensor& x, int64_t bits, bool symmetric) {
  return quantized(x, bits, symmetric, nullptr);
}

cpu::FixedScale fixed_scale(const Tensor& scale, const std::optional<Tensor>& zero_point, bool symmetric) {
  require(scale.scalar_type() == ScalarType::Float && scale.numel() == 1,
          "static activations: scale: expected one float32");
  require(
      symmetric || (zero_point.has_value() && zero_point->scalar_type() == ScalarType::Int && zero_point->numel() == 1),
      "static activations: zero_point: expected one int32");
  return {*static_cast<const float*>(scale.data_ptr()),
          symmetric ? 0 : *static_cast<const int32_t*>(zero_point->data_ptr())};
}

Quantized quantize_static(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point, int64_t bits,
                          bool symmetric) {
  const cpu::FixedScale fixed = fixed_scale(scale, zero_point, symmetric);
  return quantized(x, bits, symmetric, &fixed);
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
          input_dtype(in.x.scalar_type()),
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
          in.y_type == ScalarType::Int ? DType::kInt32 : float_dtype(in.y_type),
          {}};
}

Tensor int8_linear(const Tensor& x, const std::optional<Tensor>& weight, const Tensor& weight_scale,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& kernel_weight, int64_t act_bits,
                   bool act_symmetric, const std::string& activation, std::optional<ScalarType> out_dtype,
                   const std::optional<Tensor>& residual) {
  float_dtype(x.scalar_type());
  Input in(x, out_dtype);
  Operands operands;
  cpu::int8_linear(int8_part(in, weight, weight_scale, bias, kernel_weight, act_bits, act_symmetric,
                             parse_activation(activation), residual, operands),
                   threads());
  return operands.y;
}

Tensor int8_linear_static(const Tensor& x, const Tensor& input_scale, const std::optional<Tensor>& input_zero_point,
                          const std::optional<Tensor>& weight, const Tensor& weight_scale,
                          const std::optional<Tensor>& bias, const std::optional<Tensor>& kernel_weight,
                          int64_t act_bits, bool act_symmetric, const std::string& activation,
                          std::optional<ScalarType> out_dtype, const std::optional<Tensor>& residual) {
  const cpu::FixedScale fixed = fixed_scale(input_scale, input_zero_point, act_symmetric);
  float_dtype(x.scalar_type());
  Input in(x, out_dtype);
  Operands operands;
  cpu::Int8LinearArgs args = int8_part(in, weight, weight_scale, bias, kernel_weight, act_bits, act_symmetric,
                                       parse_activation(activation), residual, operands);
  args.fixed = &fixed;
  cpu::int8_linear(args, threads());
  return operands.y;
}

// What quantize_per_token returns, for x [..., K] or a result [..., N].
struct QuantizedOutput {
  Tensor q, scale, zero_point;

  QuantizedOutput(const Tensor& like, Shape shape, bool symmetric)
      : q(torch::stable::new_empty(like, shape, symmetric ? ScalarType::Char : ScalarType::Byte)),
        scale(torch::stable::new_empty(like, last_one(shape), ScalarType::Float)),
        zero_point(torch::stable::new_empty(like, last_one(shape), ScalarType::Int)) {}

  static Shape last_one(Shape shape) {
    shape.back() = 1;
    return shape;
  }
};

std::tuple<Tensor, Tensor, Tensor> int8_linear_requantize(const Tensor& x, const std::optional<Tensor>& weight,
                                                          const Tensor& weight_scale, const std::optional<Tensor>& bias,
                                                          const std::optional<Tensor>& kernel_weight, int64_t act_bits,
                                                          bool act_symmetric, const std::string& activation,
                                                          int64_t out_bits, bool out_symmetric) {
  require(out_bits >= 2 && out_bits <= 8, "int8_linear_requantize: out_bits: expected 2 to 8");
  float_dtype(x.scalar_type());
  Input in(x, ScalarType::Float);
  Operands operands;
  in.y_rows = 0;  // the result in float32 stays in the threads' memory
  const cpu::Int8LinearArgs args = int8_part(in, weight, weight_scale, bias, kernel_weight, act_bits, act_symmetric,
                                             parse_activation(activation), std::nullopt, operands);
  QuantizedOutput out(in.x, in.shape, out_symmetric);
  cpu::int8_linear_requantize(args,
                              {nullptr, DType::kFloat32, args.m, args.n, static_cast<int>(out_bits), out_symmetric,
                               static_cast<uint8_t*>(out.q.data_ptr()), static_cast<float*>(out.scale.data_ptr()),
                               static_cast<int32_t*>(out.zero_point.data_ptr())},
                              threads());
  return {out.q, out.scale, out.zero_point};
}

Tensor int8_linear_quantized(const Tensor& q_in, const Tensor& scale_in, const Tensor& zero_point_in,
                             const std::optional<Tensor>& weight, const Tensor& weight_scale,
                             const std::optional<Tensor>& bias, const std::optional<Tensor>& kernel_weight,
                             const std::string& activation, ScalarType out_dtype,
                             const std::optional<Tensor>& residual) {
  const bool symmetric = q_in.scalar_type() == ScalarType::Char;
  require(symmetric || q_in.scalar_type() == ScalarType::Byte, "int8_linear_quantized: q: expected int8 or uint8");
  Input in(q_in, out_dtype);
  const Tensor scale = dense(scale_in), zero_point = dense(zero_point_in);
  require(scale.scalar_type() == ScalarType::Float && scale.numel() == in.m &&
              zero_point.scalar_type() == ScalarType::Int && zero_point.numel() == in.m,
          "int8_linear_quantized: scale, zero_point: expected float32 and int32, one for each token");
  Operands operands;
  cpu::Int8LinearArgs args = int8_part(in, weight, weight_scale, bias, kernel_weight, symmetric ? 8 : 7, symmetric,
                                       parse_activation(activation), residual, operands);
  args.input = {static_cast<const uint8_t*>(in.x.data_ptr()), static_cast<const float*>(scale.data_ptr()),
                static_cast<const int32_t*>(zero_point.data_ptr())};
  cpu::int8_linear(args, threads());
  return operands.y;
}

Tensors int8_multi_linear(const Tensor& x, const MaybeTensors& weights, const Tensors& weight_scales,
                          const MaybeTensors& biases, const MaybeTensors& kernel_weights, int64_t act_bits,
                          bool act_symmetric, const std::string& activation, bool gated,
                          std::optional<ScalarType> out_dtype) {
  check_parts(weight_scales.size(), weights.size(), biases.size(), kernel_weights.size(), gated);
  require(!gated || weight_scales[0].numel() == weight_scales[1].numel(), "int8_multi_linear: N: expected it alike");
  Input in(x, out_dtype);
  float_dtype(x.scalar_type());
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcompress, CPU, m) {
  m.impl("quantize_per_token", TORCH_BOX(&quantize_per_token));
  m.impl("quantize_static", TORCH_BOX(&quantize_static));
  m.impl("int8_prepack", TORCH_BOX(&int8_prepack));
  m.impl("int8_unpack", TORCH_BOX(&int8_unpack));
  m.impl("int8_linear", TORCH_BOX(&int8_linear));
  m.impl("int8_linear_static", TORCH_BOX(&int8_linear_static));
  m.impl("int8_linear_requantize", TORCH_BOX(&int8_linear_requantize));
  m.impl("int8_linear_quantized", TORCH_BOX(&int8_linear_quantized));
  m.impl("int8_multi_linear", TORCH_BOX(&int8_multi_linear));
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
