// Kernel layout "2:4" of an int8 weight of which at most two in every four along K are not zero, one for all paths.
//
// Activations are turned for it (two_four_linear.h): a quad of k's becomes six rows, one for each pair of its k's
//
//   pair   0    1    2    3    4    5
//   k's   0 1  0 2  0 3  1 2  1 3  2 3
//
// so that what an output keeps of a quad is one row, found by its number: 4 KB of a chunk's 96 rows hold everything.
//
// Outputs in groups of 48 (the last may have fewer), K in chunks of 16 quads, zero padded:
//
//   [N/48][K/64][48] TwoFourChunk
//   [N/16*16] int32   sum_k w[n,k]
//
// A chunk's run says how many of its quads a 16-bit lane can sum, 8, 4 or 2. The lane holds one token's
// (a - 63) w[n,k], since it starts from -63 times the sum of the run's weights: with 0 <= a <= 127 the result is
// between
// -(63 p + 64 m) and 64 p + 63 m, where p is the sum of the run's positive weights and -m that of its negative ones.
// What happens before the last addition does not matter, it wraps. So a run needs 64 p + 63 m <= 32767 and
// 63 p + 64 m <= 32768, about |w| adding up to 516: twice what a lane that starts from zero may hold of either sign,
// and far less scattered. Two quads always fit, four weights of -128 reach -32768.
#pragma once

#include <cstdint>

#include "linear_grid.h"

namespace tcompress::cpu {

constexpr int kPairs = 6;              // of a quad's four k's
constexpr int kChunkQuads = 16;        // 16 quads * 6 pairs * 64 tokens * 2 bytes = 12 KB, in any first-level cache
constexpr int kTwoFourMinRun = 2;      // a run that every weight allows
constexpr int kActivationOffset = 63;  // the sums are those of a - 63

struct TwoFourChunk {
  int8_t weights[kChunkQuads][4];                // the two kept ones, and again: what a register broadcasts
  int16_t starts[kChunkQuads / kTwoFourMinRun];  // -63 * the sum of the weights of each run; zeros after the last
  uint8_t rows[kChunkQuads];                     // 6 * quad + pair; the first pair that holds all that is not zero
  uint8_t run;
  uint8_t zero[7];
};
static_assert(sizeof(TwoFourChunk) == 104);

// Where the parts begin, in bytes.
struct TwoFourLayout {
  int64_t n, k, chunks, n_panels, column_sums, bytes;

  TwoFourLayout(int64_t n, int64_t k);

  // The chunk of output n.
  int64_t chunk(int64_t output, int64_t index) const;
};

// weight [N, K], contiguous -> kernel layout; false where more than two of four are not zero.
bool two_four_prepack(const int8_t* weight, const TwoFourLayout& layout, int8_t* packed, int num_threads);

// The inverse.
void two_four_unpack(const int8_t* packed, const TwoFourLayout& layout, int8_t* weight, int num_threads);

}  // namespace tcompress::cpu
