// O = softmax(scale * Q K^T + mask) V on integers; the numbers are defined in tcompress/ops/attention_reference.py.
//
//   s[i,j]  = float(sum_d Q[i,d] K[j,d]) * k_scale[j] * q_scale[i]      in ticks: 2^-11 of an exponent of 2
//   P[i,j]  = 8192 * 2^((s[i,j] - max over the block) / 2048)           16-bit integer arithmetic, exp2_ticks
//   P'[i,j] = P * (v_scale[j] relative to the largest of the block)     16-bit
//   O[i]   += sum_j P'[i,j] V[j] * 2^((max of the block - running max) / 2048) * largest v_scale
//
// The sums of products are exact in int32, everything in floating point is products and sums without fma in one order:
// all paths agree bit for bit.
//
// Keys and values of a head lie in blocks of 64 tokens, D padded to fours, Dv to 16s, zero padded, in one of two kernel
// layouts: `wide`, 16-bit integers of up to 12 bits in pairs, or `narrow`, 8-bit integers in fours.
//
//   keys    wide   [4 panels][D/2][16 tokens][2]     t0: d0 d1 | t1: d0 d1 | … | t15             <- 64 bytes
//           narrow [4 panels][D/4][16 tokens][4]     t0: d0 d1 d2 d3 | t1: d0 d1 d2 d3 | … | t15
//   values  wide   [Dv/16][32 pairs][16 channels][2] d0: t0 t1 | d1: t0 t1 | … | d15
//           narrow [Dv/16][16 quads][16 channels][4] d0: t0 t1 t2 t3 | d1: t0 t1 t2 t3 | … | d15
#pragma once

#include <cstdint>

#include "attention_layout.h"
#include "dtype.h"
#include "path_kind.h"

namespace tcompress::cpu {

// A mask over [B, H, Sq, Skv], strides in elements (0 where it is broadcast).
struct AttentionMask {
  const void* data = nullptr;  // null: none
  bool boolean = false;        // one byte an element; else floats of `dtype`
  DType dtype = DType::kFloat32;
  int64_t stride_b = 0, stride_h = 0, stride_i = 0, stride_j = 0;
};

// A float tensor of tokens: element (b, h, s, d) is data[b * stride_b + h * stride_h + s * stride_s + d].
struct TokenView {
  const void* data;
  int64_t stride_b, stride_h, stride_s;
};

// Which keys a query sees: query i stands at i + offset, and sees position - left … position + right; -1: no limit.
struct AttentionWindow {
  bool bottom_right;  // offset = Skv - Sq, else 0
  int64_t left, right;
};

// What both entries share. B sequences; query heads share a head of k and v in groups of heads / kv_heads.
struct AttentionArgs {
  int64_t batch, heads, kv_heads, d, dv;
  DType dtype;  // of q, k, v and out
  TokenView q;
  const int64_t *q_begin, *k_begin;  // [B + 1]: where each sequence's tokens begin, or null: sq and skv tokens each
  int64_t sq, skv;
  int bits;                                      // of q, k and v
  float scale_ticks;                             // |scale| in ticks
  float scale;                                   // as given, may be negative
  float softcap, softcap_ticks, softcap_factor;  // 0: none; the same in ticks; -2 / softcap
  AttentionWindow window;
  AttentionMask mask;
  void* out;  // written at TokenView strides
  int64_t out_stride_b, out_stride_h, out_stride_s;
  float* lse;  // [B, H, Sq] (with q_begin: [H, tokens]) or null
  int64_t lse_stride_b, lse_stride_h;
};

// k and v in floating point: quantized and packed by the way.
void attention(const AttentionArgs& args, const TokenView& k, const TokenView& v, int num_threads);

// k and v in a cache, narrow: [B, Hkv, capacity blocks] of blocks, 64 scales a block.
struct KvCacheView {
  int8_t* k_data;
  float* k_scale;
  int8_t* v_data;
  float* v_scale;
  float* k_mean;  // [B, Hkv, D]
  int64_t capacity;
};

void kv_cache_attention(const AttentionArgs& args, const KvCacheView& cache, int num_threads);

// Appends s tokens after `length`; the first ones set the mean.
void kv_cache_append(const KvCacheView& cache, int64_t batch, int64_t kv_heads, int64_t d, int64_t dv, DType dtype,
                     const TokenView& k, const TokenView& v, int64_t s, int64_t length, int num_threads);

// ---- what a path provides -------------------------------------------------------------------------------------------

// Packed keys and values of one head. The scale of a token that is not finite is NaN.
struct PackedHead {
  void* k;
  float* k_scale;
  void* v;
  float* v_scale;
  const float* k_mean;  // [d]
  int64_t length;       // tokens
};

// Queries of one head of k and v, as rows g * sq + i of its group of query heads, against a range of key blocks.
struct AttentionRows {
  const AttentionArgs* args;
  int64_t b, kv_head, sq, q_begin;  // the sequence's queries, the first of them in q and out
  int64_t row0, row1;
  int64_t block0, block1;
  PackedHead head;
  float* partial;    // null, or where the unfinished result goes: [rows][dv padded], then maxima, totals, flags
  uint8_t* scratch;  // row_scratch in attention.cpp
};

struct PackArgs {
  int64_t d, dv;
  DType dtype;
  int bits;
  const void *k, *v;           // the head's first token of the range
  int64_t k_stride, v_stride;  // elements from token to token
  int64_t token0, tokens;      // written at token0 … of head
  PackedHead head;
  bool wide;
  bool whole;  // nothing is kept of the last panel of 16 tokens
};

// Rows g * sq + i of a head of k and v of a ShortArgs, short_attention.h.
struct ShortRows;

struct AttentionPath {
  bool narrow_prefill;  // 8-bit integers are multiplied as bytes; else in 16-bit lanes
  void (*attend_wide)(const AttentionRows&);
  void (*attend_narrow)(const AttentionRows&);
  void (*combine)(const AttentionRows&, int64_t splits, int64_t stride);  // partials, `stride` floats apart, to out
  void (*mean)(const void* k, DType dtype, int64_t stride, int64_t tokens, int64_t d, float* mean);
  void (*pack)(const PackArgs&);
  void (*short_rows)(const ShortRows&);
};

const AttentionPath& attention_path(Path path);

extern const AttentionPath kAttentionScalar, kAttentionAvx2, kAttentionAvx512Vnni, kAttentionNeon;

}  // namespace tcompress::cpu
