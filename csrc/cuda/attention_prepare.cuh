// Q and K to integers: what runs before the attention kernel. Layouts: attention.h.
//
//  1. key_sums: a block sums 64 keys, a thread a channel, in the order of the keys.
//  2. key_mean: the sums in the order of the blocks, times 1 / Skv. The same order as in tcompress/ops
//     attention_numbers.key_mean, so the same mean, bit for bit; a channel whose mean is not finite is not smoothed.
//  3. quantize: a block takes 64 rows. Queries: a scale each, times |scale| · log2 e, so that the kernel has exponents
//  of
//     2. Keys, less their mean: one scale for the 64, so that the kernel finds the maximum before it scales.
//
// Smoothing K leaves the softmax as it is but takes scale · q·mean from the logarithm of its denominator, and from what
// a softcap is applied to; `shift` gives it back. A query that is not finite has scale NaN; so has a block of keys with
// a key that is not, and every query that sees a key of that block becomes NaN. All padding is 0. Not measured on a
// GPU.
//
// Paper: Zhang et al. (SageAttention), arXiv 2410.02367, section 4.2.
#pragma once

#include "attention.h"
#include "elements.cuh"
#include "reduce.cuh"
#include "token_scale.cuh"

namespace tcompress::cuda {

constexpr int kPrepareThreads = 128;
constexpr int kPrepareWarps = kPrepareThreads / kWarpSize;
constexpr float kLog2E = 1.4426950408889634f;
constexpr int kAttentionBits = 8;

template <class T>
__device__ __forceinline__ T* part(void* workspace, int64_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(workspace) + offset);
}

__device__ __forceinline__ int64_t row_offset(const Heads& x, int64_t b, int64_t h, int64_t s) {
  return b * x.stride_b + h * x.stride_h + s * x.stride_s;
}

// grid (key blocks of all heads): the other axes of a grid end at 65535
__global__ void __launch_bounds__(kPrepareThreads) key_sums_kernel(const __grid_constant__ AttentionArgs args) {
  const AttentionLayout layout(args);
  const int head = padded_head(args.d, args.dv);
  const int64_t blocks = layout.skp / kKeyBlock, kv = blockIdx.x / blocks, first = blockIdx.x % blocks * kKeyBlock;
  float* sums = part<float>(args.workspace, layout.sums) + static_cast<int64_t>(blockIdx.x) * head;
  const int64_t end = first + kKeyBlock < args.skv ? first + kKeyBlock : args.skv;
  for (int c = threadIdx.x; c < head; c += kPrepareThreads) {
    float sum = 0.f;
    if (c < args.d)
      for (int64_t s = first; s < end; ++s)
        sum = ptx::add(sum, load_element(args.k.data, args.type,
                                         row_offset(args.k, kv / args.kv_heads, kv % args.kv_heads, s) + c));
    sums[c] = sum;
  }
}

// grid (B·Hkv)
__global__ void __launch_bounds__(kPrepareThreads) key_mean_kernel(const __grid_constant__ AttentionArgs args) {
  const AttentionLayout layout(args);
  const int head = padded_head(args.d, args.dv);
  const int64_t kv = blockIdx.x, blocks = layout.skp / kKeyBlock;
  const float* sums = part<float>(args.workspace, layout.sums) + kv * blocks * head;
  for (int c = threadIdx.x; c < head; c += kPrepareThreads) {
    float total = 0.f;
    for (int64_t i = 0; i < blocks; ++i) total = ptx::add(total, sums[i * head + c]);
    const float mean = ptx::multiply(total, ptx::divide(1.f, static_cast<float>(args.skv)));
    part<float>(args.workspace, layout.mean)[kv * head + c] = is_finite(mean) ? mean : 0.f;
  }
}

// A row of a tile: a lane has the channels lane, lane + 32, …
template <int kHead>
struct TileRow {
  static constexpr int kMine = kHead / kWarpSize;
  float x[kMine];
  float largest = 0.f;
  int32_t bad = 0;

  // Zeros beyond the tensor.
  __device__ __forceinline__ TileRow(const AttentionArgs& args, const Heads& heads, int64_t offset, bool inside,
                                     const float (&mean)[kMine]) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int c = i * kWarpSize + threadIdx.x % kWarpSize;
      const bool read = inside && c < args.d;
      x[i] = read ? ptx::add(load_element(heads.data, args.type, offset + c), -mean[i]) : 0.f;
      largest = ptx::maximum(largest, fabsf(x[i]));
      bad |= !is_finite(x[i]);
    }
  }

  __device__ __forceinline__ void store(int8_t* to, const TokenScale& scale, float sign) const {
#pragma unroll
    for (int i = 0; i < kMine; ++i)
      to[i * kWarpSize + threadIdx.x % kWarpSize] =
          static_cast<int8_t>(ptx::to_int(scale.integer(is_finite(x[i]) && scale.inverse != 0.f ? x[i] : 0.f) * sign));
  }
};

template <int kHead>
__device__ __forceinline__ void quantize_queries(const AttentionArgs& args, const AttentionLayout& layout,
                                                 int64_t tile) {
  constexpr int kMine = kHead / kWarpSize;
  const int64_t tiles = layout.sqp / kKeyBlock, bh = tile / tiles, b = bh / args.heads, h = bh % args.heads;
  const int64_t kv = b * args.kv_heads + h / (args.heads / args.kv_heads);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const float none[kMine] = {};
  for (int r = warp; r < kKeyBlock; r += kPrepareWarps) {
    const int64_t s = tile % tiles * kKeyBlock + r, at = bh * layout.sqp + s;
    TileRow<kHead> row(args, args.q, row_offset(args.q, b, h, s), s < args.sq, none);
    const float largest = reduce_warp(row.largest, Maximum());
    const bool finite = reduce_warp(row.bad, Maximum()) == 0;
    const TokenScale scale(0.f, largest, finite, kAttentionBits, true);
    row.store(part<int8_t>(args.workspace, layout.q) + at * kHead, scale, args.scale < 0.f ? -1.f : 1.f);
    if (lane == 0)
      part<float>(args.workspace, layout.q_scale)[at] =
          ptx::multiply(scale.scale, ptx::multiply(fabsf(args.scale), kLog2E));
    if (args.lse == nullptr && args.softcap == 0.f) continue;
    float shift = 0.f;
#pragma unroll
    for (int i = 0; i < kMine; ++i)
      shift += row.x[i] * part<float>(args.workspace, layout.mean)[kv * kHead + i * kWarpSize + lane];
    shift = reduce_warp(shift, Sum());
    if (lane == 0) part<float>(args.workspace, layout.shift)[at] = shift;
  }
}

template <int kHead>
__device__ __forceinline__ void quantize_keys(const AttentionArgs& args, const AttentionLayout& layout, int64_t tile) {
  constexpr int kMine = kHead / kWarpSize;
  const int64_t tiles = layout.skp / kKeyBlock, kv = tile / tiles;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  float mean[kMine];
#pragma unroll
  for (int i = 0; i < kMine; ++i) mean[i] = part<float>(args.workspace, layout.mean)[kv * kHead + i * kWarpSize + lane];
  const auto load = [&](int r) {
    const int64_t s = tile % tiles * kKeyBlock + r;
    return TileRow<kHead>(args, args.k, row_offset(args.k, kv / args.kv_heads, kv % args.kv_heads, s), s < args.skv,
                          mean);
  };
  float largest = 0.f;
  int32_t bad = 0;
  for (int r = warp; r < kKeyBlock; r += kPrepareWarps) {
    const TileRow<kHead> row = load(r);
    largest = ptx::maximum(largest, row.largest), bad |= row.bad;
  }
  largest = reduce_block<kPrepareThreads>(largest, Maximum(), ptx::shared_base());
  bad = reduce_block<kPrepareThreads>(bad, Maximum(), ptx::shared_base());
  const TokenScale scale(0.f, largest, bad == 0, kAttentionBits, true);
  for (int r = warp; r < kKeyBlock; r += kPrepareWarps)
    load(r).store(part<int8_t>(args.workspace, layout.k) + (tile * kKeyBlock + r) * kHead, scale, 1.f);
  if (threadIdx.x == 0) part<float>(args.workspace, layout.k_scale)[tile] = scale.scale;
}

// grid (tiles of all heads of queries, then of all heads of keys)
template <int kHead>
__global__ void __launch_bounds__(kPrepareThreads)
    quantize_queries_and_keys_kernel(const __grid_constant__ AttentionArgs args) {
  const AttentionLayout layout(args);
  const int64_t q_tiles = args.batch * args.heads * (layout.sqp / kKeyBlock), tile = blockIdx.x;
  if (tile < q_tiles)
    quantize_queries<kHead>(args, layout, tile);
  else
    quantize_keys<kHead>(args, layout, tile - q_tiles);
}

// grid (tokens of all heads)
__global__ void __launch_bounds__(kPrepareThreads)
    pad_values_kernel(const __grid_constant__ Heads v, DType type, int64_t heads, int64_t skv, int64_t dv, uint16_t* to,
                      DType to_type, int64_t width) {
  const int64_t token = blockIdx.x, bh = token / skv;
  const int64_t from = row_offset(v, bh / heads, bh % heads, token % skv);
  for (int64_t c = threadIdx.x; c < width; c += kPrepareThreads) {
    const float x = c < dv ? load_element(v.data, type, from + c) : 0.f;
    to[token * width + c] =
        static_cast<uint16_t>(to_type == DType::kFloat16 ? ptx::pack_half(x, 0.f) : ptx::pack_bfloat16(x, 0.f));
  }
}

template <int kHead>
void prepare_attention(const AttentionArgs& args, const AttentionLayout& layout, Stream stream) {
  const unsigned kv_rows = static_cast<unsigned>(args.batch * args.kv_heads);
  const unsigned k_blocks = static_cast<unsigned>(layout.skp / kKeyBlock);
  launch("attention: key_sums", key_sums_kernel, {k_blocks * kv_rows}, kPrepareThreads, 0, stream, args);
  launch("attention: key_mean", key_mean_kernel, {kv_rows}, kPrepareThreads, 0, stream, args);
  const int64_t tiles = args.batch * args.heads * (layout.sqp / kKeyBlock) + static_cast<int64_t>(kv_rows) * k_blocks;
  launch("attention: quantize", quantize_queries_and_keys_kernel<kHead>, {static_cast<unsigned>(tiles)},
         kPrepareThreads, kPrepareWarps * 4, stream, args);
}

}  // namespace tcompress::cuda
