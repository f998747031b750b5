// The ops of sparse 4-bit weights for torch's dispatcher: check tensors > raw view > call.

#include "binding_int4.h"
#include "binding_linear.h"
#include "cpu/int4_sparse_linear.h"

namespace {

void check_layout_name(const std::string& layout) {
  require(layout == "8x4", "int4_sparse_linear: layout: expected 8x4 on the CPU");
}

Tensor int4_sparse_prepack(const Tensor& weight_in, const Tensor& scale_in, int64_t group_size,
                           const std::string& layout_name) {
  check_layout_name(layout_name);
  require(weight_in.dim() == 2 && weight_in.scalar_type() == ScalarType::Char,
          "int4_sparse_prepack: weight: expected int8 [N, K]");
  const int64_t n = weight_in.size(0), k = weight_in.size(1);
  check_int4_sizes(n, k, group_size);
  require(scale_in.dim() == 2 && scale_in.size(0) == n && scale_in.size(1) == int4_groups(k, group_size),
          "int4_sparse_prepack: weight_scale: expected [N, ceil(K/group_size)]");
  const DType scale_dtype = int4_scale_dtype(scale_in.scalar_type());
  const Tensor weight = dense(weight_in), scale = dense(scale_in);
  const int8_t* data = static_cast<const int8_t*>(weight.data_ptr());
  std::vector<int64_t> counts(static_cast<size_t>((n + cpu::kMaxBlockRows - 1) / cpu::kMaxBlockRows));
  const int64_t blocks = cpu::count_blocks({data, n, k, false, cpu::kMaxBlockRows}, counts.data(), threads());
  require(blocks < cpu::kMaxSparseBlocks, "int4_sparse_prepack: weight: expected fewer than 2^31 kept blocks");
  const cpu::Int4SparseLayout layout(n, k, group_size, scale_dtype, blocks);
  Tensor packed = torch::stable::new_empty(weight, {layout.bytes}, ScalarType::Char);
  cpu::int4_sparse_prepack({data, scale.data_ptr(), counts.data()}, layout, static_cast<uint8_t*>(packed.data_ptr()),
                           threads());
  return packed;
}

// The layout of a packed weight, whose number of blocks is in it.
cpu::Int4SparseLayout checked_layout(const Tensor& packed, int64_t n, int64_t k, int64_t group_size,
                                     DType scale_dtype) {
  check_int4_sizes(n, k, group_size);
  const cpu::Int4SparseLayout empty(n, k, group_size, scale_dtype, 0);
  const char* hint = "int4_sparse_linear: kernel_weight: expected the result of int4_sparse_prepack";
  require(packed.is_contiguous() && packed.scalar_type() == ScalarType::Char && packed.numel() >= empty.bytes, hint);
  const uint8_t* data = static_cast<const uint8_t*>(packed.data_ptr());
  const uint32_t blocks = reinterpret_cast<const uint32_t*>(data + empty.offsets)[empty.rows];
  const cpu::Int4SparseLayout layout(n, k, group_size, scale_dtype, blocks);
  require(packed.numel() == layout.bytes, hint);
  return layout;
}

std::tuple<Tensor, Tensor> int4_sparse_unpack(const Tensor& packed, int64_t n, int64_t k, int64_t group_size,
                                              ScalarType scale_type, const std::string& layout_name) {
  check_layout_name(layout_name);
  const cpu::Int4SparseLayout layout = checked_layout(packed, n, k, group_size, int4_scale_dtype(scale_type));
  Tensor weight = torch::stable::new_empty(packed, {n, k}, ScalarType::Char);
  Tensor scale = torch::stable::new_empty(packed, {n, layout.groups}, scale_type);
  cpu::int4_sparse_unpack(static_cast<const uint8_t*>(packed.data_ptr()), layout,
                          static_cast<int8_t*>(weight.data_ptr()), scale.data_ptr(), threads());
  return {weight, scale};
}

Tensor int4_sparse_linear(const Tensor& x, const Tensor& kernel_weight, int64_t n, const std::optional<Tensor>& bias_in,
                          int64_t group_size, ScalarType scale_type, int64_t act_bits, bool act_symmetric,
                          const std::string& activation, std::optional<ScalarType> out_dtype,
                          const std::optional<Tensor>& residual_in, const std::string& layout_name) {
  check_layout_name(layout_name);
  Input in(x, out_dtype);
  check_act_bits(act_bits, act_symmetric);
  const DType scale_dtype = int4_scale_dtype(scale_type);
  const cpu::Int4SparseLayout layout = checked_layout(kernel_weight, n, in.k, group_size, scale_dtype);
  const std::optional<Tensor> bias = float_bias(bias_in, n);
  Tensor y = in.new_output(n);
  const std::optional<Tensor> residual = checked_residual(residual_in, in.shape, in.y_type);
  cpu::int4_sparse_linear(
      {in.x.data_ptr(), float_dtype(in.x.scalar_type()), in.m, n, in.k, group_size,
       static_cast<const uint8_t*>(kernel_weight.data_ptr()), scale_dtype, layout.blocks, data_or_null<float>(bias),
       static_cast<int>(act_bits), act_symmetric, parse_activation(activation), data_or_null<void>(residual),
       y.data_ptr(), float_dtype(in.y_type)},
      threads());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcompress, CPU, m) {
  m.impl("int4_sparse_prepack", TORCH_BOX(&int4_sparse_prepack));
  m.impl("int4_sparse_unpack", TORCH_BOX(&int4_sparse_unpack));
  m.impl("int4_sparse_linear", TORCH_BOX(&int4_sparse_linear));
}
