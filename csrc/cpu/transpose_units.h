// Turns a matrix of 32-bit units, portably.
#pragma once

#include <cstdint>

namespace tcompress::cpu {
namespace {

// in [rows][in_stride] -> out [columns][out_stride]
inline void transpose_units(const uint32_t* in, int64_t in_stride, int64_t rows, int64_t columns, uint32_t* out,
                            int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) out[c * out_stride + r] = in[r * in_stride + c];
}

}  // namespace
}  // namespace tcompress::cpu
