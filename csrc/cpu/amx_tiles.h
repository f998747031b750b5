// The shape of AMX tiles. Include below a `#pragma GCC target` with amx-tile.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "linear_grid.h"

namespace tcompress::cpu {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileSteps = 16;                  // steps of four k's in a whole tile
constexpr int kTileBytes = kTileSteps * kQuad;  // a tile's row: 64 bytes
static_assert(kTileBytes == kPanel * kQuad);

// All tiles alike: rows of 64 bytes. With fewer steps than a whole tile has, activations are [rows][4 * steps] bytes in
// the tiles 4 and 5, weights [steps][16][4] bytes in 6 and 7, and sums [rows][16] int32 in 0 … 3.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};

  constexpr TileConfig(int tile_rows, int steps) {
    for (int t = 0; t < 8; ++t) {
      bytes_per_row[t] = kTileBytes;
      rows[t] = static_cast<uint8_t>(tile_rows);
    }
    bytes_per_row[4] = bytes_per_row[5] = static_cast<uint16_t>(steps * kQuad);
    rows[6] = rows[7] = static_cast<uint8_t>(steps);
  }
};
static_assert(sizeof(TileConfig) == 64);

}  // namespace
}  // namespace tcompress::cpu
