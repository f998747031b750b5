// The CUDA ops with an int4 weight and activations in 16-bit floats (W4A16); see bindings_cuda.cpp.

#include "../binding_int4.h"
#include "binding_device.h"
#include "gate.h"
#include "int4_linear.h"
#include "quantize_per_token.h"

namespace {

constexpr ScalarType kLayoutType = ScalarType::Int;  // of the kernel layout; that of the CPU kernels is int8

// Checks the parts of an int4 weight; returns the layout that the kernel reads.
cuda::Int4Layout int4_layout(const std::optional<Tensor>& weight, const Tensor& scale,
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
  return {n, k, group_size};
}

Tensor pack(const Tensor& weight_in, const Tensor& scale_in, const std::optional<Tensor>& zero_point_in, int64_t k,
            int64_t group_size, const OnDevice& on) {
  const cuda::Int4Layout layout = int4_layout(weight_in, scale_in, zero_point_in, k, group_size);
  for (const auto& t : {std::optional<Tensor>(scale_in), zero_point_in}) on_same_device(weight_in, t);
  const Tensor weight = dense(weight_in), scale = dense(scale_in);
  std::optional<Tensor> zero_point;
  if (zero_point_in.has_value()) zero_point = dense(*zero_point_in);
  Tensor packed = torch::stable::new_empty(weight, {layout.bytes / 4}, kLayoutType);
  cuda::int4_pack(
      {static_cast<const uint8_t*>(weight.data_ptr()), scale.data_ptr(), int4_scale_dtype(scale.scalar_type()),
       data_or_null<uint8_t>(zero_point), weight.size(0), k, group_size, static_cast<uint8_t*>(packed.data_ptr())},
      on.stream);
  return packed;
}

Tensor int4_prepack(const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& zero_point, int64_t k,
                    int64_t group_size) {
  return pack(weight, scale, zero_point, k, group_size, OnDevice(weight));
}

// Rows of 16-bit floats as the product reads them: where they lie if whole chunks of 16 bytes, else a copy, zero
// padded.
Tensor aligned_floats(const Input& in, const OnDevice& on) {
  if (in.k * 2 % kRowBytes == 0 && reinterpret_cast<uintptr_t>(in.x.data_ptr()) % kRowBytes == 0) return in.x;
  const int64_t stride = padded(in.k * 2);
  Tensor copy = torch::stable::new_empty(in.x, {in.m, stride / 2}, in.x.scalar_type());
  cuda::pad_rows(static_cast<const int8_t*>(in.x.data_ptr()), in.m, in.k * 2, static_cast<int8_t*>(copy.data_ptr()),
                 stride, on.stream);
  return copy;
}

// What the parts of a call share.
struct Call {
  OnDevice on;
  Input in;
  Tensor rows;
  int64_t group_size;

  Call(const Tensor& x, std::optional<ScalarType> out_dtype, int64_t group, std::optional<int64_t> act_bits)
      : on(x), in(x, out_dtype), rows(in.x), group_size(group) {
    require(!act_bits.has_value(), "int4_linear: act_bits: expected none on CUDA");
    require(x.scalar_type() != ScalarType::Float, "int4_linear: x: expected bfloat16 or float16 on CUDA");
    rows = aligned_floats(in, on);
  }

  Tensor multiply(const std::optional<Tensor>& weight, const Tensor& scale, const std::optional<Tensor>& zero_point,
                  const std::optional<Tensor>& bias_in, const std::optional<Tensor>& kernel_weight,
                  Activation activation, ScalarType y_type, const std::optional<Tensor>& residual_in) {
    const cuda::Int4Layout layout = int4_layout(weight, scale, zero_point, in.k, group_size);
    const bool packed_before = kernel_weight.has_value() && kernel_weight->scalar_type() == kLayoutType;
    require(packed_before || weight.has_value(), "int4_linear: weight: expected it, or CUDA's kernel_weight");
    for (const auto& t : {weight, bias_in, residual_in}) on_same_device(in.x, t);
    if (packed_before) on_same_device(in.x, kernel_weight);
    const Tensor packed = packed_before ? *kernel_weight : pack(*weight, scale, zero_point, in.k, group_size, on);
    require(packed.is_contiguous() && packed.numel() * 4 == layout.bytes,
            "int4_linear: kernel_weight: expected the result of int4_prepack");
    const int64_t n = scale.size(0);
    const std::optional<Tensor> bias = float_bias(bias_in, n);
    in.y_type = y_type;
    Tensor y = in.new_output(n);
    const std::optional<Tensor> residual = checked_residual(residual_in, in.shape, y_type);
    cuda::int4_linear({rows.data_ptr(), float_dtype(rows.scalar_type()), static_cast<const uint8_t*>(packed.data_ptr()),
                       data_or_null<float>(bias), data_or_null<void>(residual), y.data_ptr(), in.m, n, in.k,
                       padded(in.k * 2) / 2, group_size, float_dtype(y_type), activation},
                      on.stream);
    return y;
  }
};

Tensor int4_linear(const Tensor& x, const std::optional<Tensor>& weight, const Tensor& weight_scale,
                   const std::optional<Tensor>& zero_point, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& kernel_weight, int64_t group_size, std::optional<int64_t> act_bits,
                   bool act_symmetric, const std::string& activation, std::optional<ScalarType> out_dtype,
                   const std::optional<Tensor>& residual) {
  Call call(x, out_dtype, group_size, act_bits);
  return call.multiply(weight, weight_scale, zero_point, bias, kernel_weight, parse_activation(activation),
                       call.in.y_type, residual);
}

Tensors int4_multi_linear(const Tensor& x, const MaybeTensors& weights, const Tensors& weight_scales,
                          const MaybeTensors& zero_points, const MaybeTensors& biases,
                          const MaybeTensors& kernel_weights, int64_t group_size, std::optional<int64_t> act_bits,
                          bool act_symmetric, const std::string& activation, bool gated,
                          std::optional<ScalarType> out_dtype) {
  check_parts(weight_scales.size(), weights.size(), biases.size(), kernel_weights.size(), gated);
  require(zero_points.size() == weights.size(), "int4_multi_linear: zero_points: expected as many as weights");
  require(!gated || weight_scales[0].size(0) == weight_scales[1].size(0), "int4_multi_linear: N: expected it alike");
  Call call(x, out_dtype, group_size, act_bits);
  const ScalarType y_type = call.in.y_type;
  Tensors y;
  for (size_t i = 0; i < weights.size(); ++i) {
    const bool second = gated && i == 1;  // float32, and not rounded before it meets the first
    y.push_back(call.multiply(weights[i], weight_scales[i], zero_points[i], biases[i], kernel_weights[i],
                              second ? Activation::kNone : parse_activation(activation),
                              second ? ScalarType::Float : y_type, std::nullopt));
  }
  if (!gated) return y;
  cuda::gate({y[0].data_ptr(), float_dtype(y_type), static_cast<const float*>(y[1].data_ptr()), y[0].numel()},
             call.on.stream);
  return {y[0]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcompress, CUDA, m) {
  m.impl("int4_prepack", TORCH_BOX(&int4_prepack));
  m.impl("int4_linear", TORCH_BOX(&int4_linear));
  m.impl("int4_multi_linear", TORCH_BOX(&int4_multi_linear));
}
