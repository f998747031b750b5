#include "linear_grid.h"

#include <cstdlib>
#include <memory>
#include <new>

#include "threads.h"

namespace tcompress::cpu {
namespace {

// What the split weighs against multiplications, measured on one core: cycles to quantize an element, and to bring a
// byte of weights from the shared cache.
constexpr double kQuantizeCycles = 0.7;
constexpr double kWeightCycles = 0.05;

}  // namespace

Grid::Grid(int64_t m, int64_t n_panels, const GridRates& rates, int threads) : m_(m), n_panels_(n_panels) {
  const int64_t n_groups = ceil_div(n_panels, kGroupPanels);
  double best_cost = -1;
  for (int r = 1; r <= threads; ++r) {
    const int c = threads / r;
    const double cell_rows = static_cast<double>(round_up(ceil_div(m, r), rates.row_unit < m ? rates.row_unit : m));
    const double cell_columns = static_cast<double>(ceil_div(n_groups, c) * kGroup);
    const double cost = cell_rows * cell_columns / rates.macs_per_cycle + cell_rows * kQuantizeCycles +
                        cell_columns * rates.weight_bytes * kWeightCycles;
    if (best_cost < 0 || cost < best_cost) {
      best_cost = cost;
      rows_ = r;
      groups_ = c;
    }
  }
  cell_rows_ = round_up(ceil_div(m, rows_), rates.row_unit);
  cell_panels_ = ceil_div(n_groups, groups_) * kGroupPanels;
}

Cell Grid::cell(int index) const {
  Cell cell{index / groups_ * cell_rows_, 0, index % groups_ * cell_panels_, 0};
  cell.m1 = cell.m0 + cell_rows_ < m_ ? cell.m0 + cell_rows_ : m_;
  cell.p1 = cell.p0 + cell_panels_ < n_panels_ ? cell.p0 + cell_panels_ : n_panels_;
  return cell;
}

uint8_t* scratch(int64_t bytes, int slot) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  struct Buffer {
    std::unique_ptr<void, Free> data;
    int64_t capacity = 0;
  };
  thread_local Buffer buffers[2];
  Buffer& buffer = buffers[slot];
  if (buffer.capacity < bytes) {
    buffer.capacity = 0;
    buffer.data.reset(std::aligned_alloc(kCacheLine, round_up(bytes, kCacheLine)));
    if (!buffer.data) throw std::bad_alloc();
    buffer.capacity = bytes;
  }
  return static_cast<uint8_t*>(buffer.data.get());
}

int64_t odd_lines(int64_t bytes) { return (ceil_div(bytes, kCacheLine) | 1) * kCacheLine; }

}  // namespace tcompress::cpu
