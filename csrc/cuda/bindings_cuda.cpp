// Check tensors > raw view > launch on torch's current stream; bindings_cuda_int4.cpp has the ops with an int4 weight.
//
// Registers kernels for the dispatch key CUDA of ops that tcompress/ops defines. Nothing waits for the device, and all
// memory is torch's, so a call can be captured in a CUDA graph.

#include <Python.h>

#include <cmath>

#include "attention.h"
#include "binding_device.h"
#include "int8_linear.h"
#include "quantize_per_token.h"
#include "two_four_linear.h"

namespace {

// int8 rows as the product reads them: where they lie if that is aligned, else a copy.
Tensor aligned_rows(const Tensor& rows_in, int64_t rows, int64_t k, const OnDevice& on) {
  const Tensor source = dense(rows_in);
  if (k % kRowBytes == 0 && cuda::aligned16(source.data_ptr())) return source;
  Tensor copy = torch::stable::new_empty(source, {rows, padded(k)}, ScalarType::Char);
  cuda::pad_rows(static_cast<const int8_t*>(source.data_ptr()), rows, k, static_cast<int8_t*>(copy.data_ptr()),
                 padded(k), on.stream);
  return copy;
}

std::tuple<Tensor, Tensor, Tensor> quantize_per_token(const Tensor& x_in, int64_t bits, bool symmetric) {
  require(x_in.dim() >= 1, "quantize_per_token: x: expected at least 1 dimension");
  require(bits >= 2 && bits <= 8, "quantize_per_token: bits: expected 2 to 8");
  const OnDevice on(x_in);
  const Tensor x = dense(x_in);
  Shape shape = shape_of(x);
  const int64_t k = shape.back();
  Tensor q = torch::stable::new_empty(x, shape, symmetric ? ScalarType::Char : ScalarType::Byte);
  shape.back() = 1;
  Tensor scale = torch::stable::new_empty(x, shape, ScalarType::Float);
  Tensor zero_point = torch::stable::new_empty(x, shape, ScalarType::Int);
  cuda::quantize_per_token(
      {x.data_ptr(), float_dtype(x.scalar_type()), rows_of(x), k, static_cast<int>(bits), symmetric, false,
       q.data_ptr(), k, static_cast<float*>(scale.data_ptr()), static_cast<int32_t*>(zero_point.data_ptr())},
      on.stream);
  return {q, scale, zero_point};
}

// What a product has besides its activations; keeps the tensors alive that the raw view points into.
struct Product {
  Tensor weight, weight_scale, y;
  std::optional<Tensor> bias, residual;
  cuda::Int8LinearArgs args{};

  // `weight_in` as the kernel reads it.
  Product(Input& in, const Tensor& weight_in, const Tensor& scale_in, const std::optional<Tensor>& bias_in,
          const std::string& activation, const std::optional<Tensor>& residual_in, const OnDevice& on)
      : weight(weight_in),
        weight_scale(dense(scale_in)),
        y(in.new_output(scale_in.numel())),
        bias(float_bias(bias_in, scale_in.numel())),
        residual(checked_residual(residual_in, in.shape, in.y_type)) {
    for (const auto& t : {std::optional<Tensor>(scale_in), bias_in, residual_in}) on_same_device(in.x, t);
    require(in.y_type != ScalarType::Int || !residual.has_value(), "int8_linear: residual: expected none for int32");
    args.weight = static_cast<const int8_t*>(weight.data_ptr());
    args.weight_scale = static_cast<const float*>(weight_scale.data_ptr());
    args.bias = data_or_null<float>(bias);
    args.residual = data_or_null<void>(residual);
    args.y = y.data_ptr();
    args.m = in.m, args.n = scale_in.numel(), args.k = in.k;
    args.lda = args.ldw = padded(in.k);
    args.y_type = in.y_type == ScalarType::Int ? DType::kInt32 : float_dtype(in.y_type);
    args.activation = parse_activation(activation);
    args.multiprocessors = cuda::multiprocessors(on.device);
  }
};

// int8 [N, K], rows at multiples of 16 bytes.
Tensor dense_weight(const Input& in, const std::optional<Tensor>& weight, const Tensor& scale,
                    const std::optional<Tensor>& kernel_weight, const OnDevice& on) {
  require(weight.has_value() && !kernel_weight.has_value(),
          "int8_linear: weight: expected the storage layout on CUDA, and no kernel_weight");
  require(weight->dim() == 2 && weight->scalar_type() == ScalarType::Char && weight->size(1) == in.k &&
              scale.dim() == 1 && scale.scalar_type() == ScalarType::Float && scale.numel() == weight->size(0),
          "int8_linear: weight: expected int8 [N, K] for x [..., K] and float32 weight_scale [N]");
  require(in.k <= cuda::kMaxK, "int8_linear: K: expected at most 65536");
  on_same_device(in.x, weight);
  return aligned_rows(*weight, weight->size(0), in.k, on);
}

// The integers of float activations and their scales; `args` points to them while this lives.
struct QuantizedRows {
  Tensor a, scale;

  // At most 7 bits where there is a zero point: less it, the integers fit into int8, and the product needs no
  // correction.
  QuantizedRows(const Input& in, int64_t bits, bool symmetric, cuda::Int8LinearArgs& args, const OnDevice& on)
      : a(torch::stable::new_empty(in.x, {in.m, args.lda}, ScalarType::Char)),
        scale(torch::stable::new_empty(in.x, {in.m}, ScalarType::Float)) {
    args.a = static_cast<const int8_t*>(a.data_ptr());
    args.scale = static_cast<const float*>(scale.data_ptr());
    cuda::quantize_per_token({in.x.data_ptr(), float_dtype(in.x.scalar_type()), in.m, in.k, static_cast<int>(bits),
                              symmetric, true, a.data_ptr(), args.lda, static_cast<float*>(scale.data_ptr()), nullptr},
                             on.stream);
  }
};

Tensor int8_linear(const Tensor& x, const std::optional<Tensor>& weight, const Tensor& weight_scale,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& kernel_weight, int64_t act_bits,
                   bool act_symmetric, const std::string& activation, std::optional<ScalarType> out_dtype,
                   const std::optional<Tensor>& residual) {
  check_act_bits(act_bits, act_symmetric);
  const OnDevice on(x);
  Input in(x, out_dtype);
  Product product(in, dense_weight(in, weight, weight_scale, kernel_weight, on), weight_scale, bias, activation,
                  residual, on);
  const QuantizedRows rows(in, act_bits, act_symmetric, product.args, on);
  cuda::int8_linear(product.args, on.stream);
  return product.y;
}

Tensor int8_sparse_linear(const Tensor& x, const Tensor& kernel_weight, const Tensor& weight_scale,
                          const std::optional<Tensor>& bias, const std::string& layout, int64_t act_bits,
                          bool act_symmetric, const std::string& activation, std::optional<ScalarType> out_dtype,
                          const std::optional<Tensor>& residual) {
  check_act_bits(act_bits, act_symmetric);
  require(layout == "mma-2:4", "int8_sparse_linear: layout: expected mma-2:4 on CUDA");
  require(weight_scale.dim() == 1 && weight_scale.scalar_type() == ScalarType::Float,
          "int8_sparse_linear: weight_scale: expected float32 [N]");
  const OnDevice on(x);
  Input in(x, out_dtype);
  require(in.k <= cuda::kMaxK, "int8_sparse_linear: K: expected at most 65536");
  require(kernel_weight.is_contiguous() && kernel_weight.scalar_type() == ScalarType::Char &&
              kernel_weight.numel() == cuda::TwoFourLayout(weight_scale.numel(), in.k).bytes &&
              cuda::aligned16(kernel_weight.data_ptr()),
          "int8_sparse_linear: kernel_weight: expected the result of sparse_prepack(weight, \"mma-2:4\")");
  on_same_device(x, kernel_weight);
  Product product(in, kernel_weight, weight_scale, bias, activation, residual, on);
  const QuantizedRows rows(in, act_bits, act_symmetric, product.args, on);
  cuda::two_four_linear(product.args, on.stream);
  return product.y;
}

Tensor int8_linear_quantized(const Tensor& q, const Tensor& scale_in, const Tensor& zero_point_in,
                             const std::optional<Tensor>& weight, const Tensor& weight_scale,
                             const std::optional<Tensor>& bias, const std::optional<Tensor>& kernel_weight,
                             const std::string& activation, ScalarType out_dtype,
                             const std::optional<Tensor>& residual) {
  const bool symmetric = q.scalar_type() == ScalarType::Char;
  require(symmetric || q.scalar_type() == ScalarType::Byte, "int8_linear_quantized: q: expected int8 or uint8");
  const OnDevice on(q);
  Input in(q, out_dtype);
  const Tensor scale = dense(scale_in), zero_point = dense(zero_point_in);
  require(scale.scalar_type() == ScalarType::Float && scale.numel() == in.m &&
              zero_point.scalar_type() == ScalarType::Int && zero_point.numel() == in.m,
          "int8_linear_quantized: scale, zero_point: expected float32 and int32, one for each token");
  on_same_device(q, scale);
  on_same_device(q, zero_point);
  Product product(in, dense_weight(in, weight, weight_scale, kernel_weight, on), weight_scale, bias, activation,
                  residual, on);
  cuda::Int8LinearArgs& args = product.args;
  const Tensor a = aligned_rows(in.x, in.m, in.k, on);
  args.a = static_cast<const int8_t*>(a.data_ptr());
  args.scale = static_cast<const float*>(scale.data_ptr());
  Tensor sums = torch::stable::new_empty(scale, {symmetric ? 0 : args.n}, ScalarType::Int);
  if (!symmetric) {
    cuda::row_sums(args.weight, args.n, args.k, args.ldw, static_cast<int32_t*>(sums.data_ptr()), on.stream);
    args.weight_sum = static_cast<const int32_t*>(sums.data_ptr());
    args.zero_point = static_cast<const int32_t*>(zero_point.data_ptr());
  }
  cuda::int8_linear(args, on.stream);
  return product.y;
}

cuda::Heads heads_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

// The same tensor, with channels side by side.
Tensor channels_last(const Tensor& t) { return t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t); }

// v as the kernel takes it: where it lies, or a copy in 16 bits; float32 becomes bfloat16, which has its range.
Tensor values_of(const Tensor& v, const OnDevice& on) {
  const DType type = float_dtype(v.scalar_type());
  const int64_t b = v.size(0), h = v.size(1), s = v.size(2), dv = v.size(3);
  if (cuda::attention_takes_v(heads_of(v), type, dv) && cuda::aligned16(v.data_ptr())) return v;
  const DType to = type == DType::kFloat16 ? type : DType::kBFloat16;
  const int64_t width = (dv + 7) / 8 * 8;
  Tensor copy =
      torch::stable::new_empty(v, {b, h, s, width}, to == DType::kFloat16 ? ScalarType::Half : ScalarType::BFloat16);
  cuda::pad_values(heads_of(v), type, b, h, s, dv, copy.data_ptr(), to, width, on.stream);
  return copy;
}

cuda::AttentionMask mask_of(const std::optional<Tensor>& mask, const Shape& shape) {
  if (!mask.has_value()) return {};
  require(shape_of(*mask) == shape, "quantized_attention: mask: expected [B, H, Sq, Skv]");
  const bool boolean = mask->scalar_type() == ScalarType::Bool;
  return {mask->data_ptr(), boolean,         boolean ? DType::kFloat32 : float_dtype(mask->scalar_type()),
          mask->stride(0),  mask->stride(1), mask->stride(2),
          mask->stride(3)};
}

std::tuple<Tensor, Tensor> quantized_attention(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                               const std::optional<Tensor>& mask, int64_t bits, bool bottom_right,
                                               int64_t left, int64_t right, double softcap, double scale,
                                               bool return_lse) {
  require(q_in.dim() == 4 && k_in.dim() == 4 && v_in.dim() == 4, "quantized_attention: q, k, v: expected [B, H, S, D]");
  require(bits == 8, "quantized_attention: bits: expected 8 on CUDA");
  require(softcap >= 0 && std::isfinite(softcap), "quantized_attention: softcap: expected a number above 0, or 0");
  for (const auto& t : {std::optional<Tensor>(k_in), std::optional<Tensor>(v_in), mask}) on_same_device(q_in, t);
  const OnDevice on(q_in);
  const Tensor q = channels_last(q_in), k = channels_last(k_in);
  require(k.scalar_type() == q.scalar_type() && v_in.scalar_type() == q.scalar_type() && k.size(0) == q.size(0) &&
              v_in.size(0) == q.size(0) && v_in.size(1) == k.size(1) && v_in.size(2) == k.size(2) &&
              k.size(3) == q.size(3),
          "quantized_attention: q, k, v: expected one type and shapes that fit");
  cuda::AttentionArgs args{};
  args.batch = q.size(0), args.heads = q.size(1), args.kv_heads = k.size(1);
  args.sq = q.size(2), args.skv = k.size(2), args.d = q.size(3), args.dv = v_in.size(3);
  require(args.d <= cuda::kMaxHeadDim && args.dv <= cuda::kMaxHeadDim, "quantized_attention: D: expected at most 256");
  require(args.sq < cuda::kMaxTokens && args.skv < cuda::kMaxTokens, "quantized_attention: S: expected below 2^29");
  require(args.kv_heads > 0 ? args.heads % args.kv_heads == 0 : args.heads == 0,
          "quantized_attention: H: expected a multiple of Hkv");
  require(std::isfinite(scale), "quantized_attention: scale: expected a finite number");

  Tensor out = torch::stable::new_empty(q, {args.batch, args.sq, args.heads, args.dv});
  Tensor lse =
      torch::stable::new_empty(q, return_lse ? Shape{args.batch, args.heads, args.sq} : Shape{0}, ScalarType::Float);
  const Tensor result = torch::stable::transpose(out, 1, 2);
  if (out.numel() == 0 && lse.numel() == 0) return {result, lse};
  if (args.skv == 0 || args.dv == 0) {
    torch::stable::zero_(out);
    if (args.skv == 0) torch::stable::fill_(lse, -INFINITY);
    require(args.skv == 0 || !return_lse, "quantized_attention: Dv: expected at least 1 with return_lse");
    return {result, lse};
  }
  const Tensor v = values_of(channels_last(v_in), on);
  args.q = heads_of(q), args.k = heads_of(k), args.v = heads_of(v);
  args.type = float_dtype(q.scalar_type()), args.v_type = float_dtype(v.scalar_type());
  args.mask = mask_of(mask, {args.batch, args.heads, args.sq, args.skv});
  args.offset = bottom_right ? args.skv - args.sq : 0;
  args.left = std::min(left, cuda::kMaxTokens), args.right = std::min(right, cuda::kMaxTokens);
  args.scale = static_cast<float>(scale), args.softcap = static_cast<float>(softcap);
  args.out = out.data_ptr();
  args.lse = return_lse ? static_cast<float*>(lse.data_ptr()) : nullptr;
  const Tensor workspace = torch::stable::new_empty(q, {cuda::AttentionLayout(args).bytes}, ScalarType::Byte);
  args.workspace = workspace.data_ptr();
  cuda::attention(args, on.stream);
  return {result, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcompress, CUDA, m) {
  m.impl("quantize_per_token", TORCH_BOX(&quantize_per_token));
  m.impl("int8_linear", TORCH_BOX(&int8_linear));
  m.impl("int8_linear_quantized", TORCH_BOX(&int8_linear_quantized));
  m.impl("int8_sparse_linear", TORCH_BOX(&int8_sparse_linear));
  m.impl("quantized_attention", TORCH_BOX(&quantized_attention));
}

// Importing the module registers the kernels; it holds nothing else.
PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT,
                               "_C_cuda",
                               "Registers the CUDA kernels of torch.ops.tcompress",
                               -1,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr};
  return PyModule_Create(&module);
}
