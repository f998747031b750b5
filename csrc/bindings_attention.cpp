// Bindings of the attention kernels: check tensors > raw views > call.

#include <cmath>

#include "binding_tensors.h"
#include "cpu/attention.h"
#include "cpu/short_attention.h"

namespace {

constexpr double kTicksPerNat = 2048 * 1.4426950408889634;  // tcompress/ops/attention_numbers.py

// The same tensor, with channels side by side.
Tensor channels_last(const Tensor& t) {
  return t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

// [B, H, S, D]
cpu::TokenView tokens_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

// [T, H, D]
cpu::TokenView packed_tokens_of(const Tensor& t) { return {t.data_ptr(), 0, t.stride(1), t.stride(0)}; }

cpu::AttentionMask mask_of(const std::optional<Tensor>& mask, const Shape& shape) {
  if (!mask.has_value()) return {};
  require(shape_of(*mask) == shape, "attention: mask: expected [B, H, Sq, Skv]");
  const bool boolean = mask->scalar_type() == ScalarType::Bool;
  const DType dtype = boolean ? DType::kFloat32 : float_dtype(mask->scalar_type());
  return {mask->data_ptr(), boolean, dtype, mask->stride(0), mask->stride(1), mask->stride(2), mask->stride(3)};
}

struct Options {
  int64_t bits;
  bool bottom_right;
  int64_t left, right;
  double softcap, scale;
  bool return_lse;
};

cpu::AttentionArgs common_args(const Tensor& q, int64_t batch, int64_t heads, int64_t kv_heads, int64_t d, int64_t dv,
                               const Options& o) {
  require(o.bits >= 2 && o.bits <= cpu::kMaxAttentionBits, "attention: bits: expected 2 to 12");
  require(d <= cpu::kMaxHeadDim && dv <= cpu::kMaxHeadDim, "attention: D: expected at most 256");
  require(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0, "attention: H: expected a multiple of Hkv");
  require(o.softcap >= 0 && std::isfinite(o.scale), "attention: softcap, scale: expected finite numbers");
  cpu::AttentionArgs args{};
  args.batch = batch;
  args.heads = heads;
  args.kv_heads = kv_heads;
  args.d = d;
  args.dv = dv;
  args.dtype = float_dtype(q.scalar_type());
  args.bits = static_cast<int>(o.bits);
  args.scale_ticks = static_cast<float>(std::fabs(o.scale) * kTicksPerNat);
  args.scale = static_cast<float>(o.scale);
  args.softcap = static_cast<float>(o.softcap);
  args.softcap_ticks = static_cast<float>(o.softcap * kTicksPerNat);
  args.softcap_factor = static_cast<float>(o.softcap == 0 ? 0 : -2 / o.softcap);
  args.window = {o.bottom_right, o.left, o.right};
  return args;
}

int64_t at_least_1(int64_t n) { return n > 1 ? n : 1; }  // as torch counts strides

// [B, H, S, Dv], laid out as [B, S, H, Dv].
Tensor new_heads(const Tensor& q, int64_t dv) {
  const int64_t b = q.size(0), h = q.size(1), s = q.size(2), token = at_least_1(h) * at_least_1(dv);
  return empty_strided(q, {b, h, s, dv}, {at_least_1(s) * token, at_least_1(dv), token, 1}, q.scalar_type());
}

// The result as `new_heads` and the logarithms [B, H, S], or [0].
std::tuple<Tensor, Tensor> new_results(const Tensor& q, int64_t dv, bool return_lse, cpu::AttentionArgs& args) {
  const int64_t b = q.size(0), h = q.size(1), s = q.size(2);
  Tensor out = new_heads(q, dv);
  Tensor lse = return_lse
                   ? empty_strided(q, {b, h, s}, {at_least_1(h) * at_least_1(s), at_least_1(s), 1}, ScalarType::Float)
                   : empty_strided(q, {0}, {1}, ScalarType::Float);
  args.out = out.data_ptr();
  args.out_stride_b = s * h * dv;
  args.out_stride_h = dv;
  args.out_stride_s = h * dv;
  args.lse = return_lse ? static_cast<float*>(lse.data_ptr()) : nullptr;
  args.lse_stride_b = h * s;
  args.lse_stride_h = s;
  return {out, lse};
}

std::tuple<Tensor, Tensor> quantized_attention(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                               const std::optional<Tensor>& mask, int64_t bits, bool bottom_right,
                                               int64_t left, int64_t right, double softcap, double scale,
                                               bool return_lse) {
  require(q_in.dim() == 4 && k_in.dim() == 4 && v_in.dim() == 4, "quantized_attention: q, k, v: expected [B, H, S, D]");
  const Tensor q = channels_last(q_in), k = channels_last(k_in), v = channels_last(v_in);
  require(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type() && k.size(0) == q.size(0) &&
              v.size(0) == q.size(0) && v.size(1) == k.size(1) && v.size(2) == k.size(2) && k.size(3) == q.size(3),
          "quantized_attention: q, k, v: expected one type and shapes that fit");
  cpu::AttentionArgs args = common_args(q, q.size(0), q.size(1), k.size(1), q.size(3), v.size(3),
                                        {bits, bottom_right, left, right, softcap, scale, return_lse});
  args.q = tokens_of(q);
  args.sq = q.size(2);
  args.skv = k.size(2);
  args.mask = mask_of(mask, {q.size(0), q.size(1), q.size(2), k.size(2)});
  auto results = new_results(q, v.size(3), return_lse, args);
  cpu::attention(args, tokens_of(k), tokens_of(v), threads());
  return results;
}

Tensor short_attention(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, int64_t first, double scale) {
  require(q_in.dim() == 4 && k_in.dim() == 4 && v_in.dim() == 4, "short_attention: q, k, v: expected [B, H, S, D]");
  const Tensor q = channels_last(q_in), k = channels_last(k_in), v = channels_last(v_in);
  cpu::ShortArgs args{};
  args.batch = q.size(0);
  args.heads = q.size(1);
  args.sq = q.size(2);
  args.d = q.size(3);
  args.kv_heads = k.size(1);
  args.skv = k.size(2);
  args.dv = v.size(3);
  require(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type() && k.size(0) == args.batch &&
              v.size(0) == args.batch && v.size(1) == args.kv_heads && v.size(2) == args.skv && k.size(3) == args.d,
          "short_attention: q, k, v: expected one type and shapes that fit");
  require(args.d <= cpu::kMaxHeadDim && args.dv <= cpu::kMaxHeadDim, "short_attention: D: expected at most 256");
  require(args.skv <= cpu::kKeyBlock, "short_attention: Skv: expected at most 64");
  require(args.kv_heads > 0 ? args.heads % args.kv_heads == 0 : args.heads == 0,
          "short_attention: H: expected a multiple of Hkv");
  require(std::isfinite(scale), "short_attention: scale: expected a finite number");
  args.dtype = float_dtype(q.scalar_type());
  args.q = tokens_of(q);
  args.k = tokens_of(k);
  args.v = tokens_of(v);
  args.first = first;
  args.scale = static_cast<float>(scale);
  Tensor out = new_heads(q, args.dv);
  args.out = out.data_ptr();
  args.out_stride_b = args.sq * args.heads * args.dv;
  args.out_stride_h = args.dv;
  args.out_stride_s = args.heads * args.dv;
  cpu::short_attention(args, threads());
  return out;
}

// Offsets that rise from 0 to the number of tokens.
const int64_t* checked_offsets(const Tensor& offsets, int64_t tokens) {
  require(offsets.dim() == 1 && offsets.numel() >= 1 && offsets.scalar_type() == ScalarType::Long &&
              offsets.is_contiguous(),
          "quantized_attention_varlen: cu_seqlens: expected int64 [N + 1]");
  const int64_t* values = static_cast<const int64_t*>(offsets.data_ptr());
  const int64_t n = offsets.numel() - 1;
  bool rising = values[0] == 0 && values[n] == tokens;
  for (int64_t i = 0; i < n; ++i) rising = rising && values[i] <= values[i + 1];
  require(rising, "quantized_attention_varlen: cu_seqlens: expected offsets that rise from 0 to the number of tokens");
  return values;
}

std::tuple<Tensor, Tensor> quantized_attention_varlen(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                                      const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                      int64_t bits, bool bottom_right, int64_t left, int64_t right,
                                                      double softcap, double scale, bool return_lse) {
  require(q_in.dim() == 3 && k_in.dim() == 3 && v_in.dim() == 3,
          "quantized_attention_varlen: q, k, v: expected [tokens, H, D]");
  const Tensor q = channels_last(q_in), k = channels_last(k_in), v = channels_last(v_in);
  require(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type() && v.size(0) == k.size(0) &&
              v.size(1) == k.size(1) && k.size(2) == q.size(2) && cu_seqlens_q.numel() == cu_seqlens_k.numel(),
          "quantized_attention_varlen: q, k, v: expected one type and shapes that fit");
  const Tensor q_offsets = dense(cu_seqlens_q), k_offsets = dense(cu_seqlens_k);
  const int64_t h = q.size(1), dv = v.size(2), tokens = q.size(0);
  cpu::AttentionArgs args = common_args(q, cu_seqlens_q.numel() - 1, h, k.size(1), q.size(2), dv,
                                        {bits, bottom_right, left, right, softcap, scale, return_lse});
  args.q = packed_tokens_of(q);
  args.q_begin = checked_offsets(q_offsets, tokens);
  args.k_begin = checked_offsets(k_offsets, k.size(0));
  Tensor out = torch::stable::new_empty(q, {tokens, h, dv});
  Tensor lse = torch::stable::new_empty(q, return_lse ? Shape{h, tokens} : Shape{0}, ScalarType::Float);
  args.out = out.data_ptr();
  args.out_stride_h = dv;
  args.out_stride_s = h * dv;
  args.lse = return_lse ? static_cast<float*>(lse.data_ptr()) : nullptr;
  args.lse_stride_h = tokens;
  cpu::attention(args, packed_tokens_of(k), packed_tokens_of(v), threads());
  return {out, lse};
}

cpu::KvCacheView cache_of(const Tensor& k_data, const Tensor& k_scale, const Tensor& v_data, const Tensor& v_scale,
                          const Tensor& k_mean, int64_t batch, int64_t d, int64_t dv) {
  require(k_data.dim() == 4, "kv_cache: k_data: expected [B, Hkv, blocks, bytes]");
  const int64_t h = k_data.size(1), blocks = k_data.size(2);
  const auto fits = [&](const Tensor& t, ScalarType type, int64_t numel) {
    return t.is_contiguous() && t.scalar_type() == type && t.numel() == numel;
  };
  const int64_t n = batch * h * blocks;
  require(fits(k_data, ScalarType::Char, n * cpu::key_block_bytes(d, false)) &&
              fits(v_data, ScalarType::Char, n * cpu::value_block_bytes(dv, false)) &&
              fits(k_scale, ScalarType::Float, n * cpu::kKeyBlock) &&
              fits(v_scale, ScalarType::Float, n * cpu::kKeyBlock) && fits(k_mean, ScalarType::Float, batch * h * d),
          "kv_cache: expected the contiguous tensors of a cache, see kv_cache_append");
  return {static_cast<int8_t*>(k_data.data_ptr()), static_cast<float*>(k_scale.data_ptr()),
          static_cast<int8_t*>(v_data.data_ptr()), static_cast<float*>(v_scale.data_ptr()),
          static_cast<float*>(k_mean.data_ptr()),  blocks};
}

void kv_cache_append(const Tensor& k_data, const Tensor& k_scale, const Tensor& v_data, const Tensor& v_scale,
                     const Tensor& k_mean, const Tensor& k_in, const Tensor& v_in, int64_t length) {
  require(k_in.dim() == 4 && v_in.dim() == 4, "kv_cache_append: k, v: expected [B, Hkv, S, D]");
  const Tensor k = channels_last(k_in), v = channels_last(v_in);
  const int64_t b = k.size(0), h = k.size(1), s = k.size(2), d = k.size(3), dv = v.size(3);
  require(v.scalar_type() == k.scalar_type() && v.size(0) == b && v.size(1) == h && v.size(2) == s &&
              d <= cpu::kMaxHeadDim && dv <= cpu::kMaxHeadDim,
          "kv_cache_append: k, v: expected one type and shapes that fit, D at most 256");
  const cpu::KvCacheView cache = cache_of(k_data, k_scale, v_data, v_scale, k_mean, b, d, dv);
  require(k_data.size(0) == b && k_data.size(1) == h && length >= 0 && length + s <= cache.capacity * cpu::kKeyBlock,
          "kv_cache_append: length: expected room for the tokens");
  cpu::kv_cache_append(cache, b, h, d, dv, float_dtype(k.scalar_type()), tokens_of(k), tokens_of(v), s, length,
                       threads());
}

std::tuple<Tensor, Tensor> kv_cache_attention(const Tensor& q_in, const Tensor& k_data, const Tensor& k_scale,
                                              const Tensor& v_data, const Tensor& v_scale, const Tensor& k_mean,
                                              const std::optional<Tensor>& mask, int64_t length, int64_t head_dim_v,
                                              bool bottom_right, int64_t left, int64_t right, double softcap,
                                              double scale, bool return_lse) {
  require(q_in.dim() == 4 && k_data.dim() == 4 && k_data.size(0) == q_in.size(0) && head_dim_v >= 0,
          "kv_cache_attention: q: expected [B, H, Sq, D]");
  const Tensor q = channels_last(q_in);
  cpu::AttentionArgs args = common_args(q, q.size(0), q.size(1), k_data.size(1), q.size(3), head_dim_v,
                                        {8, bottom_right, left, right, softcap, scale, return_lse});
  const cpu::KvCacheView cache = cache_of(k_data, k_scale, v_data, v_scale, k_mean, q.size(0), q.size(3), head_dim_v);
  require(length >= 0 && length <= cache.capacity * cpu::kKeyBlock, "kv_cache_attention: length: expected it to fit");
  args.q = tokens_of(q);
  args.sq = q.size(2);
  args.skv = length;
  args.mask = mask_of(mask, {q.size(0), q.size(1), q.size(2), length});
  auto results = new_results(q, head_dim_v, return_lse, args);
  cpu::kv_cache_attention(args, cache, threads());
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tcompress, CPU, m) {
  m.impl("quantized_attention", TORCH_BOX(&quantized_attention));
  m.impl("short_attention", TORCH_BOX(&short_attention));
  m.impl("quantized_attention_varlen", TORCH_BOX(&quantized_attention_varlen));
  m.impl("kv_cache_append", TORCH_BOX(&kv_cache_append));
  m.impl("kv_cache_attention", TORCH_BOX(&kv_cache_attention));
}
