// Copies of tiles of 8-bit rows into the stages of a product.
#pragma once

#include "platform.cuh"

namespace tcompress::cuda {

// Copies kRows rows of one stage after the other. A thread has the same chunk of every kPass-th row.
template <class Tile, int kRows, bool kOnce>
struct RowCopier {
  static constexpr int kPass = Tile::kThreads / Tile::kChunks;
  static constexpr int kPasses = ceil_div(kRows, kPass);
  static_assert(kPass % 8 == 0, "the swizzle of a thread's rows is that of its first");
  const int8_t* from[kPasses];
  int row, chunk, left;  // bytes of the rows from this thread's next chunk on

  __device__ __forceinline__ RowCopier(const int8_t* base, int64_t first, int64_t rows, int64_t stride, int64_t k)
      : row(threadIdx.x / Tile::kChunks), chunk(threadIdx.x % Tile::kChunks), left(static_cast<int>(k) - chunk * 16) {
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      const int64_t r = first + row + p * kPass, last = TC_PLANTED(kOffByOne) ? rows - 2 : rows - 1;
      from[p] = base + (r < last ? r : last) * stride + chunk * 16;
    }
  }

  __device__ __forceinline__ void copy_next(ptx::SharedPtr to) {
    const ptx::SharedPtr at = to + Tile::swizzled(row, chunk);
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      if (kRows % kPass != 0 && row + p * kPass >= kRows) break;
      if (kOnce)
        ptx::cp_async16_once(at + p * kPass * Tile::BK, from[p], left > 0);
      else
        ptx::cp_async16(at + p * kPass * Tile::BK, from[p], left > 0);
      from[p] += Tile::BK;
    }
    left -= Tile::BK;
  }
};

}  // namespace tcompress::cuda
