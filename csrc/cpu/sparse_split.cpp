#include "sparse_split.h"

#include <cstddef>

#include "integers.h"

namespace tcompress::cpu {
namespace {

constexpr int64_t kUnitOverhead = 2;  // a block row's word costs about as much as so many kept units
constexpr double kTurnCost = 16;      // of a token, in outputs

}  // namespace

SparseGroup::SparseGroup(int64_t all_n, int64_t block_rows, int64_t index)
    : row(index * kGroup / block_rows),
      rows(smaller(kGroup / block_rows, ceil_div(all_n, block_rows) - row)),
      n0(index * kGroup),
      n(smaller(kGroup, all_n - n0)) {}

std::vector<int64_t> balanced_groups(int64_t n, int64_t block_rows, int64_t words, const uint32_t* offsets, int parts) {
  const int64_t n_groups = ceil_div(n, kGroup), rows = ceil_div(n, block_rows);
  const auto work_before = [&](int64_t group) {
    const int64_t row = smaller(group * kGroup / block_rows, rows);
    return offsets[row] + kUnitOverhead * row * words;
  };
  std::vector<int64_t> first(static_cast<std::size_t>(parts) + 1, n_groups);
  first[0] = 0;
  int64_t group = 0;
  for (int p = 1; p < parts; ++p) {
    while (group < n_groups && work_before(group) * parts < work_before(n_groups) * p) ++group;
    first[static_cast<std::size_t>(p)] = group;
  }
  return first;
}

TokenSplit split_tokens(int64_t m, int64_t n, int threads, int64_t unit, int64_t most, double fixed) {
  TokenSplit split{1, threads, 0, 0};
  double best_cost = 0;
  for (int r = 1; r <= threads; ++r) {
    const double rows = static_cast<double>(round_up(ceil_div(m, r), unit));
    const double cost = (rows + fixed) * static_cast<double>(n) / (threads / r) + kTurnCost * rows;
    if (r == 1 || cost < best_cost) {
      best_cost = cost;
      split.by_tokens = r;
    }
  }
  split.by_outputs = threads / split.by_tokens;
  split.cell_rows = round_up(ceil_div(m, split.by_tokens), unit);
  split.tile_tokens = round_up(ceil_div(split.cell_rows, ceil_div(split.cell_rows, most)), unit);
  return split;
}

}  // namespace tcompress::cpu
