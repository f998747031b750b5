// What the linear layers share: the split of the output over threads, and each thread's scratch memory.
#pragma once

#include <cstdint>

namespace tcompress::cpu {

constexpr int kPanel = 16;       // outputs in a panel
constexpr int kGroupPanels = 3;  // panels in a group
constexpr int kGroup = kGroupPanels * kPanel;
constexpr int kQuad = 4;          // k's that one 32-bit lane multiplies: a step
constexpr int kMaxTileRows = 32;  // rows of a tile call, at most

constexpr int64_t kCacheLine = 64;
constexpr int64_t kMinMacsPerThread = 1 << 18;  // about 5 us of work; starting a thread costs 1 to 2 us

// What the cost of a cell depends on.
struct GridRates {
  int row_unit;           // rows of a register tile: the last one is paid for in full
  double macs_per_cycle;  // about what the tiles reach
  double weight_bytes;    // a weight, in bytes
};

// One cell of the output: rows [m0, m1), panels [p0, p1) in whole groups. May be empty.
struct Cell {
  int64_t m0, m1, p0, p1;
};

// Cuts the output into rows x groups of panels, one cell a thread.
class Grid {
 public:
  // The cell counts whose largest cell costs least; at most `threads` cells.
  Grid(int64_t m, int64_t n_panels, const GridRates& rates, int threads);

  int cells() const { return rows_ * groups_; }
  int64_t cell_rows() const { return cell_rows_; }
  Cell cell(int index) const;

 private:
  int64_t m_, n_panels_;
  int rows_ = 1, groups_ = 1;
  int64_t cell_rows_, cell_panels_;
};

// Memory of the calling thread, aligned to a cache line. It grows and is kept until the thread ends: a fresh allocation
// of this size would fault in its pages at every call. The next call with the same slot may move it; a function that
// calls another one that has scratch memory takes slot 1.
uint8_t* scratch(int64_t bytes, int slot = 0);

// A row stride in bytes that is an odd number of cache lines: rows of a power-of-two length would all fall into the
// same cache sets.
int64_t odd_lines(int64_t bytes);

}  // namespace tcompress::cpu
