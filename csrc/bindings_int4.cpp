// The int4 ops: check tensors > raw view > call (bindings.cpp has the rest).

#include "binding_int4.h"
#include "binding_linear.h"
#include "cpu/int4_linear.h"

namespace {

// Checks the parts of an int4 weight; returns its kernel layout.
cpu::Int4KernelLayout int4_layout(const std::optional<Tensor>& weight, const Tensor& scale,
                                  const std::optional<Tensor>& zero_point, int64_t k, int64_t group_size) {
  require(scale.dim() == 2, "int4_linear: weight_scale: expected [N, ceil(K/group_size)]");
  const int64_t n = scale.size(0);
  check_int4_sizes(n, k, group_size);
  const int64_t groups = int4_groups(k, group_size);
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
  m.impl("int4_prepack", TORCH_BOX(&int4_prepack));
  m.impl("int4_unpack", TORCH_BOX(&int4_unpack));
  m.impl("int4_linear", TORCH_BOX(&int4_linear));
  m.impl("int4_multi_linear", TORCH_BOX(&int4_multi_linear));
}
