// What conversions.cpp exports for each vector class.
#pragma once

#include <cstdint>

struct Conversions {
  using Convert = void (*)(const void* from, void* to, int64_t n);
  int lanes;
  Convert half_to_float, bfloat16_to_float, float_to_half, float_to_bfloat16;
};
