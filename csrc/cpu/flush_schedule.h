// When 16-bit sums must be widened: a proof made while the weight is packed.
//
// A 16-bit lane of output n adds a[k]*w[n,k] for two of the four k's of each step. With 0 <= a <= 127 its value stays
// between -127 * (sum of the lane's |negative w|) and 127 * (sum of its positive w). A run is the longest sequence of
// steps in which neither sum exceeds 32767 / 127 = 258 in any lane of the group: within it no partial sum can leave 16
// bits, whatever the activations are. One step always fits: 2 * 128 = 256.
#pragma once

#include <cstdint>

namespace tcompress::cpu {

constexpr int kMaxActivation = 127;
constexpr int kMaxLaneSum = 32767 / kMaxActivation;
static_assert(2 * 128 <= kMaxLaneSum, "a step must fit");
constexpr int kMaxRun = 255;  // a run's length is stored in a byte

// Below this mean length, widening at every step in a tile of more rows is the faster (measured, docs/design/002).
constexpr int kMinMeanRun = 3;

// weights: one group [steps][3][16][4]. Writes the run lengths, whose sum is `steps`, closed by a zero if there is room
// in runs [steps]; a single zero where runs are too short to pay.
void make_flush_schedule(const int8_t* weights, int64_t steps, uint8_t* runs);

}  // namespace tcompress::cpu
