// int8 attention on CUDA: the contract of attention_prepare.cuh and attention.cuh. Free of torch.
#pragma once

#include <cstdint>

#include "../cpu/dtype.h"
#include "int8_linear.h"

namespace tcompress::cuda {

constexpr int kKeyBlock = 64;  // keys of a step, and of one scale
constexpr int kMaxHeadDim = 256;
constexpr int64_t kMaxTokens = 1 << 29;  // positions are int32

// [B, H, S, D] with the channels side by side; strides in elements.
struct Heads {
  const void* data;
  int64_t stride_b, stride_h, stride_s;
};

struct AttentionMask {
  const void* data;  // null: none
  bool boolean;
  cpu::DType type;  // of a float mask
  int64_t stride_b, stride_h, stride_m, stride_n;
};

// softmax(scale · q kᵀ + mask) v. Query i stands at position i + offset and sees the keys from position - left to
// position + right, -1: no limit.
struct AttentionArgs {
  Heads q, k, v;      // q, k of any float type; v as `attention_takes_v` wants it
  cpu::DType type;    // of q, k and out
  cpu::DType v_type;  // kFloat16 or kBFloat16
  int64_t batch, heads, kv_heads, sq, skv, d, dv;
  AttentionMask mask;
  int64_t offset, left, right;  // at most kMaxTokens, as Sq and Skv
  float scale;                  // of the scores; may be negative
  float softcap;                // c > 0: a score s counts as c · tanh(s / c), before the mask; 0: as it is
  void* out;                    // [B, Sq, H, Dv]
  float* lse;                   // [B, H, Sq], log of the softmax's denominator, or null
  void* workspace;              // attention_workspace_bytes, aligned to 16
};

// Head size of the tiles: 64, 128 or 256.
constexpr int padded_head(int64_t d, int64_t dv) {
  const int64_t most = d > dv ? d : dv;
  return most <= 64 ? 64 : most <= 128 ? 128 : 256;
}
// Queries of a block.
constexpr int query_block(int head) { return head == 256 ? 64 : 128; }

// Q and K as the attention kernel reads them, one after the other in the workspace.
//   q [B·H, Sqp, D] int8, q_scale [B·H, Sqp], shift [B·H, Sqp]      Sqp: Sq in whole blocks of queries
//   k [B·Hkv, Skp, D] int8, k_scale [B·Hkv, Skp / 64], mean [B·Hkv, D], sums [B·Hkv, Skp / 64, D]
struct AttentionLayout {
  int64_t sqp, skp, q, k, q_scale, shift, k_scale, mean, sums, bytes;

  explicit constexpr AttentionLayout(const AttentionArgs& a)
      : sqp(0), skp(0), q(0), k(0), q_scale(0), shift(0), k_scale(0), mean(0), sums(0), bytes(0) {
    const int64_t head = padded_head(a.d, a.dv), block = query_block(static_cast<int>(head));
    const int64_t rows = a.batch * a.heads, kv_rows = a.batch * a.kv_heads;
    sqp = (a.sq + block - 1) / block * block;
    skp = (a.skv + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
    k = rows * sqp * head;
    q_scale = k + kv_rows * skp * head;
    shift = q_scale + rows * sqp * 4;
    k_scale = shift + rows * sqp * 4;
    mean = k_scale + kv_rows * (skp / kKeyBlock) * 4;
    sums = mean + kv_rows * head * 4;
    bytes = sums + kv_rows * (skp / kKeyBlock) * head * 4;
  }
};

// Whether the kernel can read v where it lies: rows of whole chunks of 16 bytes, on addresses that are multiples of 16.
// Otherwise `pad_values` makes such a copy.
constexpr bool attention_takes_v(const Heads& v, cpu::DType type, int64_t dv) {
  return type != cpu::DType::kFloat32 && dv % 8 == 0 && v.stride_b % 8 == 0 && v.stride_h % 8 == 0 &&
         v.stride_s % 8 == 0;
}
inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// v [B, Hkv, Skv, Dv] of any float type to `to` [B, Hkv, Skv, width] of 16 bits, zeros beyond Dv.
void pad_values(const Heads& v, cpu::DType type, int64_t batch, int64_t heads, int64_t skv, int64_t dv, void* to,
                cpu::DType to_type, int64_t width, StreamHandle stream);

void attention(const AttentionArgs& args, StreamHandle stream);

}  // namespace tcompress::cuda
