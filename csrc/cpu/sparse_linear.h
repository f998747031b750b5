// y = activation(x W^T + bias) + residual where most blocks of W are zero and are not multiplied.
//
// int8:    acc and y as in int8_linear.h, bit for bit: what is left out adds nothing to the sums.
// floats:  acc[m,n] = sum over kept k of x[m,k] * w[n,k] in float32; a token that holds NaN or infinity gives NaN.
//
// 1. Tokens go in tiles of 8 vectors. A tile's activations are turned to [unit][token], so that one unit of weights,
//    broadcast, meets a whole vector of tokens: sparsity along K and N costs no gather.
// 2. Per group of 48 outputs, the words of the bitmap are passed over in order: 64 units of activations (16 KB at 64
//    tokens) stay in the first-level cache for all outputs of the group, and so do the group's sums.
// 3. The sums are turned back to [token][output] and go through the epilogue of the dense layers.
// 4. Few tokens do not fill a vector. They take another way: with block rows of 1 the kept units are spread over a
//    register by the bits of the bitmap, with block rows of 8 the outputs are the lanes; activations stay as they are.
#pragma once

#include <cstdint>

#include "activation_kind.h"
#include "dtype.h"
#include "int4_linear.h"
#include "int4_sparse_linear.h"
#include "int8_linear.h"
#include "path_kind.h"
#include "sparse_layout.h"

namespace tcompress::cpu {

struct SparseLinearArgs {
  const void* x;  // [M, K], contiguous
  DType x_dtype;
  int64_t m, n, k;
  const uint8_t* kernel_weight;  // sparse_layout.h
  bool floats;
  int64_t block_rows, blocks;
  const float* weight_scale;  // int8: [N]
  const float* bias;          // [N] or null
  int act_bits;               // int8: 2 … 8
  bool act_symmetric;
  Activation activation;
  const void* residual;  // [M, N] like y, or null
  void* y;               // [M, N], contiguous
  DType y_dtype;         // int8: kInt32 stores acc itself
};

void sparse_linear(const SparseLinearArgs& args, int num_threads);

// ---- what a path provides -------------------------------------------------------------------------------------------

constexpr int kMaxTileVectors = 8;                         // vectors of tokens in a tile
constexpr int kSegmentWords = kSegmentUnits / kWordUnits;  // block rows of 1 take no more in a tile call
constexpr int kMaxBlockWords =
    8;  // words of block rows of 8 in a tile call: their positions are listed once for all tokens

// Adds the products of some words of all block rows of a group to its sums.
struct SparseTileArgs {
  // [units of the words][vectors * lanes]; block rows of 1: from the words' segment on, all of it readable
  const uint32_t* a;
  int vectors;             // 1 … kMaxTileVectors
  const uint64_t* bitmap;  // the first word of the first block row
  const uint8_t* runs;     // int8: of the first block row
  int64_t word_stride;     // from one block row to the next
  int64_t words;
  uint64_t last_word;  // the bits of the last word that may be set
  const uint32_t* values;
  const uint8_t* positions;  // block rows of 1
  uint32_t* cursor;          // [rows]: the next block of each block row; advanced
  uint32_t blocks;           // in all: no cursor goes past it, whatever the bitmap says
  int rows;
  uint32_t* acc;  // [rows * block_rows][vectors * lanes] int32 or float
};

// All words of all block rows of a group for at most kMaxDecodeRows tokens.
struct SparseDecodeArgs {
  const uint32_t* a;  // [tokens][a_stride], readable for whole segments
  int64_t a_stride;   // in units
  int tokens;
  const uint64_t* bitmap;
  int64_t words;
  uint64_t last_word;
  const uint32_t* values;
  const uint8_t* positions;  // block rows of 1
  const uint32_t* offsets;   // of the first block row
  uint32_t blocks;
  int rows;
  uint32_t* acc;  // [tokens][acc_stride] int32 or float; set, not added to
  int64_t acc_stride;
};

constexpr int kMaxDecodeRows = 4;

using SparseTile = void (*)(const SparseTileArgs&);
using SparseDecode = void (*)(const SparseDecodeArgs&);

// By block rows of 1 and of 8.
struct SparseKernels {
  SparseTile tile[2];
  SparseDecode decode[2];   // or null: then the tile takes any number of tokens
  bool whole_rows = false;  // the tile of block rows of 8 takes all words at once
};

struct SparseLinearPath {
  int lanes;               // tokens in a vector
  int tile_vectors;        // of a tile, at most kMaxTileVectors: 64 units of activations must leave room in the L1
  uint8_t symmetric_flip;  // 0x80 where the multiplier wants unsigned activations; the zero point is then 128
  QuantizeRow quantize_row;
  void (*to_float)(const void* x, DType dtype, int64_t k, float* out);
  // in [rows][in_stride] -> out [columns][out_stride]; whole multiples of 8 rows and columns.
  void (*transpose)(const uint32_t* in, int64_t in_stride, int64_t rows, int64_t columns, uint32_t* out,
                    int64_t out_stride);
  SparseKernels signed_int8, unsigned_int8, floats;
  Int4SparseKernels int4;
  void (*(*epilogue)(Activation, DType))(const EpilogueArgs&);
  void (*(*float_epilogue)(Activation, DType))(const FloatEpilogueArgs&);
};

extern const SparseLinearPath kSparseLinearScalar, kSparseLinearAvx2, kSparseLinearAvxVnni, kSparseLinearAvx512Vnni,
    kSparseLinearAmx, kSparseLinearNeon;

const SparseLinearPath& sparse_linear_path(Path path);

}  // namespace tcompress::cpu
