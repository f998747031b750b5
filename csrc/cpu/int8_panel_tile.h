// Register tiles that take whole panels, and the way a tile call is cut into them. Everything is in an anonymous
// namespace: files of several instruction sets include this.
#pragma once

#include <cstdint>

#include "int8_linear.h"

namespace tcompress::cpu {
namespace {

constexpr int kPanelQuad = kPanel * kQuad;  // bytes of a panel's step

struct PanelTileArgs {
  const uint8_t* a;
  int64_t a_stride;
  const int8_t* weights;  // the first panel's part of the group's first step
  int64_t step_bytes;     // of all panels of the group
  int64_t steps;
  int32_t* acc;
  int64_t acc_stride;
};

using PanelTile = void (*)(const PanelTileArgs&);

constexpr int kTileRows = 6, kWideRows = 2;

// Six rows of one panel are a tile. Up to three rows have too few sums in a panel to keep the multipliers busy: they
// take all panels of the group, two rows at a time.
struct PanelTiles {
  PanelTile four, five, six;                // rows x one panel
  PanelTile wide[kWideRows][kGroupPanels];  // [rows - 1][panels - 1]
};

inline void run_panel_tiles(const Int8TileArgs& args, const PanelTiles& tiles) {
  const int64_t step_bytes = args.n_panels * kPanelQuad, acc_stride = args.n_panels * kPanel;
  const auto run = [&](PanelTile tile, int r, int p) {
    tile({args.a + r * args.a_stride, args.a_stride, args.weights + p * kPanelQuad, step_bytes, args.steps,
          args.acc + r * acc_stride + p * kPanel, acc_stride});
  };
  const int left = args.rows % kTileRows, whole = args.rows - left;
  const PanelTile last = left == 4 ? tiles.four : (left == 5 ? tiles.five : nullptr);
  for (int p = 0; p < args.n_panels; ++p) {
    for (int r = 0; r < whole; r += kTileRows) run(tiles.six, r, p);
    if (last != nullptr) run(last, whole, p);
  }
  if (last != nullptr) return;
  for (int r = whole; r < args.rows; r += kWideRows) {
    const int rows = args.rows - r < kWideRows ? args.rows - r : kWideRows;
    run(tiles.wide[rows - 1][args.n_panels - 1], r, 0);
  }
}

}  // namespace
}  // namespace tcompress::cpu
