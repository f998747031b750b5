// How the work of a sparse layer is cut: outputs in groups, tokens in tiles, and both over threads.
#pragma once

#include <cstdint>
#include <vector>

#include "linear_grid.h"

namespace tcompress::cpu {

// A group of outputs: block rows [row, row + rows), outputs [n0, n0 + n).
struct SparseGroup {
  int64_t row, rows, n0, n;

  SparseGroup(int64_t all_n, int64_t block_rows, int64_t index);
};

// Cuts the groups into `parts` of about the same work; returns the first group of each, and the end. offsets: where
// each block row's values begin [R + 1].
std::vector<int64_t> balanced_groups(int64_t n, int64_t block_rows, int64_t words, const uint32_t* offsets, int parts);

struct TokenSplit {
  int by_tokens, by_outputs;  // threads
  int64_t cell_rows;          // tokens of a thread
  int64_t tile_tokens;
};

// Threads that share the tokens each turn their own; threads that share the outputs each turn all of them.
// unit: tokens are paid for in multiples of it; most: of a tile; fixed: what is done once for all tokens, in tokens.
TokenSplit split_tokens(int64_t m, int64_t n, int threads, int64_t unit, int64_t most, double fixed);

}  // namespace tcompress::cpu
