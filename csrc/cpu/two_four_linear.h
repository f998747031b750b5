// int8_linear.h with a weight in the layout "2:4" (two_four_layout.h); the same numbers, bit for bit.
//
// 1. Tokens go in tiles of 64: quantized, turned to [quad][token][4], and each quad to its six pairs [6][token][2].
// 2. Per group of 48 outputs and chunk of K, each output's kept weights, broadcast, meet the rows of their pairs: a
//    vpmaddubsw and a vpaddw for 16 tokens and 4 k's, half of what the dense tile needs, at the cost of a load.
// 3. A chunk's 12 KB of activations stay in the first-level cache for all outputs of the group, and so do the sums.
// 4. The sums are turned back to [token][output] and go through the epilogue of the dense layers.
//
// Where a path has no such kernel, and for symmetric activations, the weight is unpacked for int8_linear at each call:
// about a nanosecond a weight, as long as 80 tokens take. A weight from int8_prepack is the better choice there, and
// for fewer than 24 tokens, since a vector has 16 of them (docs/design/009-two-four.md).
#pragma once

#include <cstdint>

#include "int8_linear.h"
#include "two_four_layout.h"

namespace tcompress::cpu {

// args.kernel_weight is in the layout "2:4"; args.input is not read.
void two_four_linear(const Int8LinearArgs& args, int num_threads);

// ---- what a path provides -------------------------------------------------------------------------------------------

constexpr int kTwoFourTokens = 64;                 // of a tile, and between the rows of pairs
constexpr int kTwoFourLanes = 16;                  // tokens in a vector of 16-bit sums
constexpr int kPairRowBytes = kTwoFourTokens * 2;  // one pair of each token
constexpr int kChunkBytes = kChunkQuads * kPairs * kPairRowBytes;
constexpr int kReadableBytes = 256 * kPairRowBytes;  // from a chunk on, whatever its row numbers say

struct TwoFourTileArgs {
  const uint8_t* pairs;  // [chunks][16][6][64][2]
  int vectors;           // 1 … 4
  const TwoFourChunk* weights;
  int64_t chunks;
  int64_t outputs;  // of the group
  int32_t* acc;     // [outputs][64], added to: sum_k (a - 63) w
};

struct TwoFourPath {
  QuantizeRow quantize_row;
  // in [rows][in_stride] -> out [columns][out_stride]; whole multiples of 8 rows and columns.
  void (*transpose)(const uint32_t* in, int64_t in_stride, int64_t rows, int64_t columns, uint32_t* out,
                    int64_t out_stride);
  // A chunk: quads [16][64] -> pairs [16][6][64][2]
  void (*spread_pairs)(const uint32_t* quads, int vectors, uint8_t* pairs);
  void (*tile)(const TwoFourTileArgs&);
  void (*(*epilogue)(Activation, DType))(const EpilogueArgs&);
};

extern const TwoFourPath kTwoFourAvx2;

}  // namespace tcompress::cpu
