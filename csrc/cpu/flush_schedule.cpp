#include "flush_schedule.h"

#include <cstring>

#include "int8_linear.h"

namespace tcompress::cpu {

void make_flush_schedule(const int8_t* weights, int64_t steps, uint8_t* runs) {
  constexpr int kLanes = kGroup * 2;  // two 16-bit lanes an output
  int16_t positive[kLanes] = {}, negative[kLanes] = {};
  int64_t n_runs = 0;
  int length = 0;
  for (int64_t step = 0; step < steps; ++step) {
    const int8_t* w = weights + step * kGroup * kQuad;
    int16_t step_positive[kLanes], step_negative[kLanes];
    int16_t largest = 0;
    for (int i = 0; i < kLanes; ++i) {
      const int16_t first = w[2 * i], second = w[2 * i + 1];
      step_positive[i] = static_cast<int16_t>((first > 0 ? first : 0) + (second > 0 ? second : 0));
      step_negative[i] = static_cast<int16_t>((first < 0 ? -first : 0) + (second < 0 ? -second : 0));
      const int16_t p = static_cast<int16_t>(positive[i] + step_positive[i]);
      const int16_t n = static_cast<int16_t>(negative[i] + step_negative[i]);
      const int16_t larger = p > n ? p : n;
      largest = largest > larger ? largest : larger;
    }
    if (largest > kMaxLaneSum || length == kMaxRun) {
      runs[n_runs++] = static_cast<uint8_t>(length);
      length = 0;
      std::memset(positive, 0, sizeof(positive));
      std::memset(negative, 0, sizeof(negative));
    }
    ++length;
    for (int i = 0; i < kLanes; ++i) {
      positive[i] = static_cast<int16_t>(positive[i] + step_positive[i]);
      negative[i] = static_cast<int16_t>(negative[i] + step_negative[i]);
    }
  }
  if (length > 0) runs[n_runs++] = static_cast<uint8_t>(length);
  if (n_runs * kMinMeanRun > steps) n_runs = 0;
  if (n_runs < steps) std::memset(runs + n_runs, 0, static_cast<size_t>(steps - n_runs));
}

}  // namespace tcompress::cpu
