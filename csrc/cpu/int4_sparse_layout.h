// Kernel layout of a 4-bit weight whose zeros come in blocks of 8 outputs x 4 inputs, one for all paths. A bitmap tells
// which blocks are kept, as in sparse_layout.h; weights are -8 … 7, with one scale for group_size of them along K.
//
//   [R][W] uint64                      bit u of word w: block 64 w + u of this block row is kept
//   [R + 1] uint32                     where each block row's values begin, in blocks
//   [R][G][8] float16 or float32       scales, zero padded;  G = ceil(K / group_size)
//   [blocks][16] bytes                 from a multiple of 64 on, and 64 zero bytes that a vector load may read
//     o0: k0 k1 k2 k3 | o1 | o2 | o3   in the low nibbles, o4 … o7 in the high ones, each weight + 8
//
// 16 bytes in both halves of a ymm, the upper one shifted right by 4, are the eight outputs in order.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "sparse_layout.h"

namespace tcompress::cpu {

constexpr int kInt4BlockBytes = 16;
constexpr int kInt4BlockQuads = 4;  // outputs in the low nibbles
constexpr int kInt4Zero = 8;        // stored weight that means 0

// Where the parts begin, in bytes.
struct Int4SparseLayout {
  int64_t n, k, units, rows, words, groups, blocks;
  int group_shift;      // unit u has scale u >> group_shift
  int64_t scale_bytes;  // of one scale
  int64_t offsets, scales, values, bytes;

  // group_size: a power of two from 32 to 512, or at least k; blocks: how many are kept.
  Int4SparseLayout(int64_t n, int64_t k, int64_t group_size, DType scale_dtype, int64_t blocks);
};

// counts: of count_blocks.
struct Int4SparsePrepackArgs {
  const int8_t* weight;  // [N, K] contiguous, -8 … 7
  const void* scale;     // [N, G] contiguous
  const int64_t* counts;
};

void int4_sparse_prepack(const Int4SparsePrepackArgs& args, const Int4SparseLayout& layout, uint8_t* packed,
                         int num_threads);

// The inverse.
void int4_sparse_unpack(const uint8_t* packed, const Int4SparseLayout& layout, int8_t* weight, void* scale,
                        int num_threads);

}  // namespace tcompress::cpu
