// Kernel layout of a weight with many zeros, one for all paths.
//
// A unit is what one 32-bit lane multiplies: one float, or four int8 weights along K (zero padded). Outputs go in block
// rows of 1 or 8; a block is one unit of each of its outputs, and is kept unless all of it is zero. Positions along K
// are bits, because a word of 64 of them costs two bytes less than 64 kept units at 5 %, and because a processor steps
// from bit to bit (tzcnt, blsr) or spreads kept units over a register (vpexpandd) without any other index.
//
//   [R][W] uint64      bit u of word w: block 64 w + u of this block row is kept;  W = ceil(U / 64)
//   [R + 1] uint32     where each block row's values begin, in blocks
//   [N/16*16] int32    int8: sum_k w[n,k]
//   [R] uint8         int8: run, how many consecutive kept blocks of it can be summed in 16 bits (see below)
//   [blocks][block_rows] units, from a multiple of 64 bytes on
//   [blocks] uint8    block rows of 1: position modulo kSegmentUnits of each kept block
//   64 zero bytes that a vector load may read
//
// With one output a kept unit is 64 to 256 multiplications only: to find its place by the bitmap, one word of 64 units
// after the other, took as long (docs/design/008). A byte a unit is the same place ready made, for many words at once.
//
// A 16-bit lane adds a[k] * w[n,k] for two of a unit's four k's, 0 <= a <= 127. A block row's run is the largest number
// r, 1 … kMaxSparseRun, such that in no sequence of r kept blocks, wherever it begins, a lane's positive or negative
// weights add up to more than kMaxLaneSum (flush_schedule.h). One number for the row, so that the kernel's loops have
// lengths that a processor foresees.
#pragma once

#include <cstdint>

#include "integers.h"

namespace tcompress::cpu {

constexpr int kWordUnits = 64;
constexpr int kUnitBytes = 4;
constexpr int kSegmentUnits = 256;  // a position is a byte
constexpr int kMaxBlockRows = 8;
constexpr int kMaxSparseRun = 64;
constexpr int kSparsePad = 64;                   // bytes after the last value
constexpr int64_t kMaxSparseBlocks = 1LL << 31;  // an offset fits 32 bits

// Where the parts begin, in bytes.
struct SparseLayout {
  int64_t n, units, block_rows, rows, words, blocks;
  int64_t offsets, column_sums, runs, values, positions, bytes;  // positions: block rows of 1

  // block_rows: 1 or 8; blocks: how many are kept.
  SparseLayout(int64_t n, int64_t k, bool floats, int64_t block_rows, int64_t blocks);
};

struct SparseWeightView {
  const void* weight;  // [N, K] contiguous, float32 or int8
  int64_t n, k;
  bool floats;
  int64_t block_rows;
};

// Whether block u of a block row is kept; its units go to `block`, zeros where they are outside of the weight.
bool read_block(const SparseWeightView& w, int64_t row, int64_t u, uint32_t* block);

// Kept blocks of each block row [R]; returns their sum.
int64_t count_blocks(const SparseWeightView& weight, int64_t* counts, int num_threads);

void sparse_prepack(const SparseWeightView& weight, const SparseLayout& layout, const int64_t* counts, uint8_t* packed,
                    int num_threads);

// The inverse: weight [N, K] float32 or int8. `blocks` is what the layout was made for.
void sparse_unpack(const uint8_t* packed, const SparseLayout& layout, int64_t k, bool floats, void* weight,
                   int num_threads);

}  // namespace tcompress::cpu
