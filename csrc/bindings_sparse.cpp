// The ops of sparse weights for torch's dispatcher: check tensors > raw view > call.

#include "binding_linear.h"
#include "cpu/sparse_linear.h"
#include "cpu/two_four_linear.h"

namespace {

int64_t block_rows_of(const std::string& layout, bool floats) {
  if (layout == (floats ? "unstructured" : "1x4")) return 1;
  require(layout == "8x4", "sparse_linear: layout: expected 8x4, or unstructured (floats), 1x4 (int8)");
  return cpu::kMaxBlockRows;
}

bool is_floats(ScalarType type) {
  require(type == ScalarType::Float || type == ScalarType::Char, "sparse_linear: weight: expected float32 or int8");
  return type == ScalarType::Float;
}

bool is_two_four(const std::string& layout, bool floats) { return !floats && layout == "2:4"; }

Tensor prepack_two_four(const Tensor& weight) {
  const cpu::TwoFourLayout layout(weight.size(0), weight.size(1));
  Tensor packed = torch::stable::new_empty(weight, {layout.bytes}, ScalarType::Char);
  require(cpu::two_four_prepack(static_cast<const int8_t*>(weight.data_ptr()), layout,
                                static_cast<int8_t*>(packed.data_ptr()), threads()),
          "sparse_prepack: weight: expected at most two of four along K that are not zero, for the layout 2:4");
  return packed;
}

cpu::TwoFourLayout checked_two_four(const Tensor& packed, int64_t n, int64_t k) {
  require(n >= 0 && k >= 0, "sparse_linear: N, K: expected at least 0");
  require(k <= cpu::kMaxK, "sparse_linear: K: expected at most 65536");
  const cpu::TwoFourLayout layout(n, k);
  require(packed.is_contiguous() && packed.scalar_type() == ScalarType::Char && packed.numel() == layout.bytes,
          "sparse_linear: kernel_weight: expected the result of sparse_prepack(weight, \"2:4\")");
  return layout;
}

Tensor sparse_prepack(const Tensor& weight_in, const std::string& layout_name) {
  require(weight_in.dim() == 2, "sparse_prepack: weight: expected 2 dimensions");
  const bool floats = is_floats(weight_in.scalar_type());
  const Tensor weight = dense(weight_in);
  if (is_two_four(layout_name, floats)) return prepack_two_four(weight);
  const cpu::SparseWeightView view{weight.data_ptr(), weight.size(0), weight.size(1), floats,
                                   block_rows_of(layout_name, floats)};
  std::vector<int64_t> counts(static_cast<size_t>((view.n + view.block_rows - 1) / view.block_rows));
  const int64_t blocks = cpu::count_blocks(view, counts.data(), threads());
  require(blocks < cpu::kMaxSparseBlocks, "sparse_prepack: weight: expected fewer than 2^31 kept blocks");
  const cpu::SparseLayout layout(view.n, view.k, floats, view.block_rows, blocks);
  Tensor packed = torch::stable::new_empty(weight, {layout.bytes}, ScalarType::Char);
  cpu::sparse_prepack(view, layout, counts.data(), static_cast<uint8_t*>(packed.data_ptr()), threads());
  return packed;
}

constexpr int64_t kMaxSide = 1LL << 31;  // no size in bytes leaves 64 bits

// The layout of a packed weight, whose number of blocks is in it.
cpu::SparseLayout checked_layout(const Tensor& packed, int64_t n, int64_t k, bool floats, int64_t block_rows) {
  require(n >= 0 && k >= 0 && n < kMaxSide && k < kMaxSide, "sparse_linear: N, K: expected 0 to 2^31 - 1");
  require(floats || k <= cpu::kMaxK, "sparse_linear: K: expected at most 65536");
  const cpu::SparseLayout empty(n, k, floats, block_rows, 0);
  const char* hint = "sparse_linear: kernel_weight: expected the result of sparse_prepack(weight, layout)";
  require(packed.is_contiguous() && packed.scalar_type() == ScalarType::Char && packed.numel() >= empty.bytes, hint);
  const uint8_t* data = static_cast<const uint8_t*>(packed.data_ptr());
  const uint32_t blocks = reinterpret_cast<const uint32_t*>(data + empty.offsets)[empty.rows];
  const cpu::SparseLayout layout(n, k, floats, block_rows, blocks);
  require(packed.numel() == layout.bytes, hint);
  return layout;
}

Tensor sparse_unpack(const Tensor& packed, int64_t n, int64_t k, ScalarType dtype, const std::string& layout_name) {
  const bool floats = is_floats(dtype);
  if (is_two_four(layout_name, floats)) {
    const cpu::TwoFourLayout layout = checked_two_four(packed, n, k);
    Tensor weight = torch::stable::new_empty(packed, {n, k}, dtype);
    cpu::two_four_unpack(static_cast<const int8_t*>(packed.data_ptr()), layout, static_cast<int8_t*>(weight.data_ptr()),
                         threads());
    return weight;
  }
  const cpu::SparseLayout layout = checked_layout(packed, n, k, floats, block_rows_of(layout_name, floats));
  Tensor weight = torch::stable::new_empty(packed, {n, k}, dtype);
  cpu::sparse_unpack(static_cast<const uint8_t*>(packed.data_ptr()), layout, k, floats, weight.data_ptr(), threads());
  return weight;
}

// What both ops share.
Tensor run(const Tensor& x, const Tensor& kernel_weight, int64_t n, bool floats, const std::string& layout_name,
           const float* weight_scale, const std::optional<Tensor>& bias_in, int64_t act_bits, bool act_symmetric,
           const std::string& activation, std::optional<ScalarType> out_dtype,
           const std::optional<Tensor>& residual_in) {
  float_dtype(x.scalar_type());
  Input in(x, out_dtype);
  const bool integers = in.y_type == ScalarType::Int;
  require(!(integers && (floats || residual_in.has_value())), "sparse_linear: out_dtype: expected a float type");
  const bool two_four = is_two_four(layout_name, floats);
  const int64_t block_rows = two_four ? 1 : block_rows_of(layout_name, floats);
  if (two_four) checked_two_four(kernel_weight, n, in.k);
  const int64_t blocks = two_four ? 0 : checked_layout(kernel_weight, n, in.k, floats, block_rows).blocks;
  const std::optional<Tensor> bias = float_bias(bias_in, n);
  Tensor y = in.new_output(n);
  const std::optional<Tensor> residual = checked_residual(residual_in, in.shape, in.y_type);
  const DType x_dtype = float_dtype(in.x.scalar_type());
  const DType y_dtype = integers ? DType::kInt32 : float_dtype(in.y_type);
  if (two_four) {
    cpu::two_four_linear({in.x.data_ptr(), x_dtype, in.m, n, in.k, static_cast<const int8_t*>(kernel_weight.data_ptr()),
                          weight_scale, data_or_null<float>(bias), static_cast<int>(act_bits), act_symmetric,
                          parse_activation(activation), data_or_null<void>(residual), y.data_ptr(), y_dtype},
                         threads());
    return y;
  }
  cpu::sparse_linear({in.x.data_ptr(), x_dtype, in.m, n, in.k, static_cast<const uint8_t*>(kernel_weight.data_ptr()),
                      floats, block_rows, blocks, weight_scale, data_or_null<float>(bias), static_cast<int>(act_bits),
                      act_symmetric, parse_activation(activation), data_or_null<void>(residual), y.data_ptr(), y_dtype},
                     threads());
  return y;
}

Tensor sparse_linear(const Tensor& x, const Tensor& kernel_weight, int64_t out_features,
                     const std::optional<Tensor>& bias, const std::string& layout, const std::string& activation,
                     std::optional<ScalarType> out_dtype, const std::optional<Tensor>& residual) {
  return run(x, kernel_weight, out_features, true, layout, nullptr, bias, 0, true, activation, out_dtype, residual);
}

Tensor int8_sparse_linear(const Tensor& x, const Tensor& kernel_weight, const Tensor& weight_scale_in,
                          const std::optional<Tensor>& bias, const std::string& layout, int64_t act_bits,
                          bool act_symmetric, const std::string& activation, std::optional<ScalarType> out_dtype,
                          const std::optional<Tensor>& residual) {
  require(weight_scale_in.scalar_type() == ScalarType::Float && weight_scale_in.dim() == 1,
          "int8_sparse_linear: weight_scale: expected float32 [N]");
  check_act_bits(act_bits, act_symmetric);
  const Tensor weight_scale = dense(weight_scale_in);
  return run(x, kernel_weight, weight_scale.numel(), false, layout, static_cast<const float*>(weight_scale.data_ptr()),
             bias, act_bits, act_symmetric, activation, out_dtype, residual);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcompress, CPU, m) {
  m.impl("sparse_prepack", TORCH_BOX(&sparse_prepack));
  m.impl("sparse_unpack", TORCH_BOX(&sparse_unpack));
  m.impl("sparse_linear", TORCH_BOX(&sparse_linear));
  m.impl("int8_sparse_linear", TORCH_BOX(&int8_sparse_linear));
}
