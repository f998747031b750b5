// y = activation(x W^T + bias) + residual with a 4-bit weight of which only the kept blocks are multiplied.
//
//   acc[m,n,g] = sum over kept k in g of a'[m,k] * w[n,k]           exact in int32; a' as in int4_linear.h
//   y[m,n]     = activation(sum_g float(acc) * weight_scale[n,g] * scale[m] + bias[n]) + residual[m,n]
//
// 1. All tokens of a block are quantized and turned to [unit][token], in tiles of 8 vectors (sparse_linear.h).
// 2. Per group of 48 outputs the weights are unpacked to bytes, once for all tiles, word by word of the bitmap: 64
// units
//    of a tile's activations then stay in the first-level cache for all of the group's block rows.
// 3. A span is what is summed in integers: at most a word of a block row, within one scale group. Activations are
//    a' + 128 where the multiplier wants them unsigned, and a span starts from -128 times the sum of its weights. It
//    ends in a multiplication by its scales and an addition to float sums.
// 4. Few tokens: outputs are the lanes, weights are unpacked in registers and stay unsigned, activations are signed,
// and
//    sums start from -8 times the sum of the activations that they will meet.
#pragma once

#include <cstdint>

#include "activation_kind.h"
#include "dtype.h"
#include "int4_sparse_layout.h"
#include "linear_grid.h"

namespace tcompress::cpu {

struct Int4SparseLinearArgs {
  const void* x;  // [M, K], contiguous
  DType x_dtype;
  int64_t m, n, k, group_size;
  const uint8_t* kernel_weight;  // int4_sparse_layout.h
  DType scale_dtype;             // kFloat16 or kFloat32
  int64_t blocks;
  const float* bias;   // [N] or null
  int act_bits;        // 2 … 8
  bool act_symmetric;  // asymmetric: at most 7 bits, so that a - zero_point fits int8
  Activation activation;
  const void* residual;  // [M, N] like y, or null
  void* y;               // [M, N], contiguous
  DType y_dtype;
};

void int4_sparse_linear(const Int4SparseLinearArgs& args, int num_threads);

// ---- what a path provides -------------------------------------------------------------------------------------------

constexpr int kMaxGroupRows = kGroup / kMaxBlockRows;
constexpr int kInt4ZeroUnits =
    8;  // after a token's activations, where few tokens are multiplied; a vector may read them

struct Int4Span {
  uint32_t row;    // block row of the group of outputs
  uint32_t count;  // of kept blocks: 1 … kWordUnits
  uint32_t scale;  // which eight scales
};

// Some block rows, and what they become: spans in the order of the words, then of the rows.
struct Int4SparseUnpackArgs {
  const uint64_t* bitmap;   // of the first block row
  const uint32_t* offsets;  // likewise
  const uint8_t* values;
  uint32_t blocks;
  int rows;  // at most kMaxGroupRows
  int64_t words;
  uint64_t last_word;
  int64_t groups;  // of scales
  int group_shift;
  uint32_t stride;  // from unit to unit of the activations, in units
  Int4Span* spans;
  uint32_t* positions;     // of each kept block: unit * stride; 8 more may be written
  uint32_t* block_values;  // [kept blocks][8] units of signed bytes
  uint32_t* starts;        // [spans][8]: what each output's sums start from; only where activations are unsigned
};

struct Int4SparseTileArgs {
  const uint32_t* a;  // [units][stride]
  int vectors;        // 1 … kMaxTileVectors
  int64_t stride;
  const Int4Span* spans;
  int64_t span_count;
  const uint32_t* positions;
  const uint32_t* block_values;
  const uint32_t* starts;
  const float* scales;  // [][8]
  float* acc;           // [rows * 8][stride], added to
};

// All words of some block rows for at most kMaxInt4DecodeTokens tokens.
struct Int4SparseDecodeArgs {
  const uint32_t* a;      // [tokens][a_stride], whole words and kInt4ZeroUnits zero units
  const int32_t* excess;  // likewise: -8 times the sum of a unit's activations
  int64_t a_stride;
  int tokens;
  const uint64_t* bitmap;
  const uint32_t* offsets;
  const uint8_t* values;
  uint32_t blocks;
  int rows;
  int64_t words;
  uint64_t last_word;
  int64_t groups;
  int group_shift;
  const float* scales;  // [rows][groups][8]
  float* acc;           // [tokens][acc_stride]; set
  int64_t acc_stride;
  uint32_t* list;  // [int4_list_words(words)]
};

constexpr int kMaxInt4DecodeTokens = 4;

// Room for what decode lists of a block row: two numbers of each unit and one of each token, and a word more of each.
constexpr int64_t int4_list_words(int64_t words) { return (kMaxInt4DecodeTokens + 2) * (words + 1) * kWordUnits; }

struct Int4SparseKernels {
  uint8_t flip;                                    // of the tile: 0x80 where its activations are unsigned
  int64_t (*unpack)(const Int4SparseUnpackArgs&);  // returns the number of spans
  void (*tile)(const Int4SparseTileArgs&);
  void (*decode)(const Int4SparseDecodeArgs&);  // or null: then the tile takes any number of tokens
};

}  // namespace tcompress::cpu
