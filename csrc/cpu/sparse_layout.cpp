// Between a dense weight [N, K] and the kernel layout drawn in sparse_layout.h.

#include "sparse_layout.h"

#include <cstring>

#include "flush_schedule.h"
#include "linear_grid.h"
#include "threads.h"

namespace tcompress::cpu {
namespace {

// Unit u of output n; zeros outside the weight. -0 counts as 0.
uint32_t unit_at(const SparseWeightView& w, int64_t n, int64_t u) {
  uint32_t unit = 0;
  if (n >= w.n) return unit;
  if (w.floats) {
    std::memcpy(&unit, static_cast<const float*>(w.weight) + n * w.k + u, kUnitBytes);
    return unit << 1 == 0 ? 0 : unit;
  }
  const int64_t left = w.k - u * kQuad;
  std::memcpy(&unit, static_cast<const int8_t*>(w.weight) + n * w.k + u * kQuad,
              static_cast<size_t>(left < kQuad ? left : kQuad));
  return unit;
}

// Weights of one sign in a lane (two of a unit's four k's).
int lane_size(const uint32_t& unit, int lane, int sign) {
  int8_t w[kQuad];
  std::memcpy(w, &unit, kUnitBytes);
  const int first = sign * w[lane * 2], second = sign * w[lane * 2 + 1];
  return (first > 0 ? first : 0) + (second > 0 ? second : 0);
}

// The longest run of a block row's kept blocks, by a window for each lane and sign: it shrinks to what fits.
uint8_t longest_run(const uint32_t* blocks, int64_t count, int64_t block_rows) {
  int64_t run = kMaxSparseRun;
  for (int64_t j = 0; j < block_rows; ++j)
    for (int lane = 0; lane < 2; ++lane)
      for (int sign = -1; sign <= 1; sign += 2) {
        int sum = 0;
        for (int64_t first = 0, i = 0; i < count; ++i) {
          sum += lane_size(blocks[i * block_rows + j], lane, sign);
          if (i - first == run) sum -= lane_size(blocks[first++ * block_rows + j], lane, sign);
          for (; sum > kMaxLaneSum; ++first) {
            run = i - first;
            sum -= lane_size(blocks[first * block_rows + j], lane, sign);
          }
        }
      }
  return static_cast<uint8_t>(run);
}

void pack_row(const SparseWeightView& w, const SparseLayout& layout, int64_t row, uint32_t offset, uint8_t* packed) {
  uint64_t* bitmap = reinterpret_cast<uint64_t*>(packed) + row * layout.words;
  uint32_t* values = reinterpret_cast<uint32_t*>(packed + layout.values);
  int64_t at = offset * w.block_rows;
  for (int64_t word = 0; word < layout.words; ++word) {
    uint64_t bits = 0;
    for (int64_t u = word * kWordUnits; u < layout.units && u < (word + 1) * kWordUnits; ++u) {
      uint32_t block[kMaxBlockRows];
      if (!read_block(w, row, u, block)) continue;
      bits |= 1ULL << (u % kWordUnits);
      std::memcpy(values + at, block, static_cast<size_t>(w.block_rows) * kUnitBytes);
      if (w.block_rows == 1) packed[layout.positions + at] = static_cast<uint8_t>(u % kSegmentUnits);
      at += w.block_rows;
    }
    bitmap[word] = bits;
  }
  if (w.floats) return;
  const int64_t first = offset * w.block_rows;
  packed[layout.runs + row] = longest_run(values + first, (at - first) / w.block_rows, w.block_rows);
  int32_t* column_sums = reinterpret_cast<int32_t*>(packed + layout.column_sums);
  for (int64_t n = row * w.block_rows; n < (row + 1) * w.block_rows && n < w.n; ++n) {
    int32_t sum = 0;
    for (int64_t k = 0; k < w.k; ++k) sum += static_cast<const int8_t*>(w.weight)[n * w.k + k];
    column_sums[n] = sum;
  }
}

}  // namespace

SparseLayout::SparseLayout(int64_t n_, int64_t k, bool floats, int64_t block_rows_, int64_t blocks_)
    : n(n_),
      units(floats ? k : ceil_div(k, kQuad)),
      block_rows(block_rows_),
      rows(ceil_div(n, block_rows)),
      words(ceil_div(units, kWordUnits)),
      blocks(blocks_) {
  offsets = rows * words * static_cast<int64_t>(sizeof(uint64_t));
  column_sums = offsets + (rows + 1) * static_cast<int64_t>(sizeof(uint32_t));
  runs = column_sums + (floats ? 0 : round_up(n, kPanel) * static_cast<int64_t>(sizeof(int32_t)));
  values = round_up(runs + (floats ? 0 : rows), kCacheLine);
  positions = values + blocks * block_rows * kUnitBytes;
  bytes = positions + (block_rows == 1 ? blocks : 0) + kSparsePad;
}

bool read_block(const SparseWeightView& w, int64_t row, int64_t u, uint32_t* block) {
  uint32_t any = 0;
  for (int64_t j = 0; j < w.block_rows; ++j) any |= block[j] = unit_at(w, row * w.block_rows + j, u);
  return any != 0;
}

int64_t count_blocks(const SparseWeightView& weight, int64_t* counts, int num_threads) {
  const SparseLayout layout(weight.n, weight.k, weight.floats, weight.block_rows, 0);
  const int threads = useful_threads(weight.n * weight.k, kMinMacsPerThread, num_threads);
  parallel_tasks(threads, [&](int t) {
    for (int64_t row = layout.rows * t / threads; row < layout.rows * (t + 1) / threads; ++row) {
      counts[row] = 0;
      uint32_t block[kMaxBlockRows];
      for (int64_t u = 0; u < layout.units; ++u) counts[row] += read_block(weight, row, u, block);
    }
  });
  int64_t total = 0;
  for (int64_t row = 0; row < layout.rows; ++row) total += counts[row];
  return total;
}

void sparse_prepack(const SparseWeightView& weight, const SparseLayout& layout, const int64_t* counts, uint8_t* packed,
                    int num_threads) {
  std::memset(packed + layout.offsets, 0, static_cast<size_t>(layout.values - layout.offsets));
  std::memset(packed + layout.bytes - kSparsePad, 0, kSparsePad);
  uint32_t* offsets = reinterpret_cast<uint32_t*>(packed + layout.offsets);
  uint32_t total = 0;
  for (int64_t row = 0; row < layout.rows; ++row) {
    offsets[row] = total;
    total += static_cast<uint32_t>(counts[row]);
  }
  offsets[layout.rows] = total;
  const int threads = useful_threads(weight.n * weight.k, kMinMacsPerThread, num_threads);
  parallel_tasks(threads, [&](int t) {
    for (int64_t row = layout.rows * t / threads; row < layout.rows * (t + 1) / threads; ++row)
      pack_row(weight, layout, row, offsets[row], packed);
  });
}

void sparse_unpack(const uint8_t* packed, const SparseLayout& layout, int64_t k, bool floats, void* weight,
                   int num_threads) {
  const uint64_t* bitmap = reinterpret_cast<const uint64_t*>(packed);
  const uint32_t* offsets = reinterpret_cast<const uint32_t*>(packed + layout.offsets);
  const uint32_t* values = reinterpret_cast<const uint32_t*>(packed + layout.values);
  const int64_t element = floats ? kUnitBytes : 1, unit_k = kUnitBytes / element;
  std::memset(weight, 0, static_cast<size_t>(layout.n * k * element));
  const int threads = useful_threads(layout.n * k, kMinMacsPerThread, num_threads);
  parallel_tasks(threads, [&](int t) {
    for (int64_t row = layout.rows * t / threads; row < layout.rows * (t + 1) / threads; ++row) {
      int64_t block = offsets[row];
      for (int64_t u = 0; u < layout.units; ++u) {
        if ((bitmap[row * layout.words + u / kWordUnits] >> (u % kWordUnits) & 1) == 0 || block >= layout.blocks)
          continue;
        for (int64_t j = 0; j < layout.block_rows; ++j) {
          const int64_t n = row * layout.block_rows + j;
          if (n >= layout.n) break;
          const int64_t bytes = smaller(k - u * unit_k, unit_k) * element;
          std::memcpy(static_cast<char*>(weight) + (n * k + u * unit_k) * element,
                      values + block * layout.block_rows + j, static_cast<size_t>(bytes));
        }
        ++block;
      }
    }
  });
}

}  // namespace tcompress::cpu
