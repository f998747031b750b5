// O = softmax(scale * Q K^T) V in float32, for so few keys that making integers of them costs more than it saves;
// defined in tcompress/ops/short_attention.py.
//
// The scores of a query fit in a few registers, so there is one pass: all scores, their maximum, 2^x, P V. Nothing is
// packed or transposed: K is read as it lies, by products along D that are summed over the lanes four keys at once.
#pragma once

#include <cstdint>

#include "attention.h"

namespace tcompress::cpu {

struct ShortArgs {
  int64_t batch, heads, kv_heads, sq, skv, d, dv;  // skv at most kKeyBlock
  DType dtype;                                     // of q, k, v and out
  TokenView q, k, v;
  int64_t first;  // query i sees the keys 0 … first + i - 1
  float scale;
  void* out;
  int64_t out_stride_b, out_stride_h, out_stride_s;
};

void short_attention(const ShortArgs& args, int num_threads);

struct ShortRows {
  const ShortArgs* args;
  int64_t b, kv_head, row0, row1;  // rows g * sq + i of a group of query heads
  float* scratch;                  // [2 * kKeyBlock][kMaxHeadDim]: keys and values that are not float32 or not in 16s
};

}  // namespace tcompress::cpu
