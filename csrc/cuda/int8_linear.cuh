// int8 linear layer by mma.sync: y = finish(a weightᵀ), sums exact in int32.
//
//   a [M, K]        weight [N, K]          a block computes BM × BN of y
//                                          warps: WM × WN of them side by side, WK share the steps of k
//      K →             K →
//   ┌─────────┐     ┌─────────┐            stage s of STAGES in shared memory:
//   │  BM     │     │  BN     │              a rows [BM][BK bytes] | weight rows [BN][BK bytes]
//   │         │     │         │
//   └─────────┘     └─────────┘            a row's chunks of 16 bytes are swapped about (Tile::swizzled), so that eight
//                                          rows of one column of chunks lie in eight different groups of banks:
//                                            BK = 64, two rows a line of 128 bytes:   chunk ^ (row / 2 % 4)
//                                            BK > 64:                                 chunk ^ (row % 8)
//
//  1. cp.async brings the first STAGES - 1 stages. Rows beyond M and N read the last row, and nobody stores what comes
//     of it; beyond K zeros come. (A chunk that K cuts: a is zero there.)
//  2. For each BK of K: wait for its stage; one barrier, which also says that all warps have left the stage that the
//     next copy overwrites; start that copy; then for each 32 of k: ldmatrix the fragments of a and weight, multiply.
//  3. The sums go through shared memory, where warps that shared k meet, to the epilogue, eight neighbours a thread.
//
// Constraints (the binding sees to them): K <= 65536; rows of a and weight start at multiples of 16 bytes. Compute
// capability 8.0 or above; on 9.0 warp-group products (wgmma) would be faster. Not measured on a GPU.
#pragma once

#include "epilogue.cuh"
#include "row_copier.cuh"

namespace tcompress::cuda {

template <int kBM, int kBN, int kBK, int kWM, int kWN, int kWK, int kStages>
struct Int8GemmTile {
  static constexpr int BM = kBM, BN = kBN, BK = kBK, WM = kWM, WN = kWN, WK = kWK, STAGES = kStages;
  static constexpr int kThreads = WM * WN * WK * kWarpSize;
  static constexpr int kRowTiles = BM / WM / 16, kColumnTiles = BN / WN / 8;  // mma tiles of a warp
  static constexpr int kSteps = BK / 32 / WK;                                 // mma steps of a warp in a stage
  static constexpr int kChunks = BK / 16;                                     // of a row
  static constexpr int kStageBytes = (BM + BN) * BK;
  static constexpr int kSumBytes = WK * BM * BN * 4;
  static constexpr int kSharedBytes = kStageBytes * STAGES > kSumBytes ? kStageBytes * STAGES : kSumBytes;
  static_assert(BM % (16 * WM) == 0 && BN % (16 * WN) == 0 && BK % (32 * WK) == 0);
  static_assert(kChunks == 4 || kChunks % 8 == 0);
  static_assert(kThreads % kChunks == 0);

  // Offset of a chunk in a tile of rows.
  __device__ static constexpr int swizzled(int row, int chunk) {
    return row * BK + (kChunks == 4 ? chunk ^ ((row >> 1) & 3) : chunk ^ (row & 7)) * 16;
  }
  // Offset of the sum (row, column): eight neighbours stay together; four rows of a fragment go to different banks.
  __device__ static constexpr int sum_at(int row, int column) { return (row * BN + (column ^ (row & 3) * 8)) * 4; }
};

// Blocks that run at the same time share rows of a and of the weight: eight blocks of M under one another, then the
// next column.
__device__ __forceinline__ void block_of(int64_t m_blocks, int64_t n_blocks, int64_t& bm, int64_t& bn) {
  constexpr int64_t kGroup = 8;
  const int64_t id = blockIdx.x, in_group = kGroup * n_blocks;
  const int64_t first = id / in_group * kGroup;
  const int64_t height = m_blocks - first < kGroup ? m_blocks - first : kGroup;
  bm = first + id % in_group % height;
  bn = id % in_group / height;
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) int8_linear_kernel(const __grid_constant__ Int8LinearArgs args) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int wn = warp % Tile::WN, wm = warp / Tile::WN % Tile::WM, wk = warp / (Tile::WN * Tile::WM);
  int64_t bm, bn;
  block_of(ceil_div<int64_t>(args.m, Tile::BM), ceil_div<int64_t>(args.n, Tile::BN), bm, bn);
  const ptx::SharedPtr shared = ptx::shared_base();

  // Where a lane's row of 16 bytes of the fragments lies: a, four matrices: rows 0-7 and 8-15 of the first 16 bytes of
  // k, then of the second; weight: rows 0-7 of both halves of k, then rows 8-15.
  const int a_row = wm * (Tile::BM / Tile::WM) + lane % 16, a_chunk = lane / 16;
  const int w_row = wn * (Tile::BN / Tile::WN) + lane % 8 + lane / 16 * 8, w_chunk = lane / 8 % 2;

  RowCopier<Tile, Tile::BM, false> a_rows(args.a, bm * Tile::BM, args.m, args.lda, args.k);
  RowCopier<Tile, Tile::BN, (Tile::BM <= 16)> w_rows(args.weight, bn * Tile::BN, args.n, args.ldw, args.k);
  const int stages = static_cast<int>(ceil_div<int64_t>(args.k, Tile::BK));
  const auto copy_stage = [&](int stage, int slot) {
    if (stage < stages) {
      a_rows.copy_next(shared + slot * Tile::kStageBytes);
      w_rows.copy_next(shared + slot * Tile::kStageBytes + Tile::BM * Tile::BK);
    }
    ptx::cp_async_commit();  // an empty group too: the number of groups says which stage has come
  };

  // 1.
#pragma unroll
  for (int s = 0; s < Tile::STAGES - 1; ++s) copy_stage(s, s);

  int32_t acc[Tile::kRowTiles][Tile::kColumnTiles][4] = {};
  int slot = 0, free_slot = Tile::STAGES - 1;
  for (int stage = 0; stage < stages; ++stage) {
    // 2.
    if (TC_PLANTED(kUnwaitedCopy))
      ptx::cp_async_wait<Tile::STAGES - 1>();
    else
      ptx::cp_async_wait<Tile::STAGES - 2>();
    if (!TC_PLANTED(kMissingBarrier)) ptx::barrier();
    copy_stage(stage + Tile::STAGES - 1, free_slot);
    const ptx::SharedPtr a_at = shared + slot * Tile::kStageBytes, w_at = a_at + Tile::BM * Tile::BK;
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step) {
      const int chunk = (step * Tile::WK + wk) * 2;
      uint32_t a[Tile::kRowTiles][4], w[Tile::kColumnTiles / 2][4];
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i)
        ptx::ldmatrix_x4(a[i], a_at + Tile::swizzled(a_row + i * 16, chunk + a_chunk));
#pragma unroll
      for (int j = 0; j < Tile::kColumnTiles / 2; ++j)
        ptx::ldmatrix_x4(w[j], w_at + Tile::swizzled(w_row + j * 16, chunk + w_chunk));
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i)
#pragma unroll
        for (int j = 0; j < Tile::kColumnTiles; ++j)
          ptx::mma_s8(acc[i][j], a[i], w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1], acc[i][j]);
    }
    slot = slot + 1 == Tile::STAGES ? 0 : slot + 1;
    free_slot = free_slot + 1 == Tile::STAGES ? 0 : free_slot + 1;
  }

  // 3.
  ptx::cp_async_wait<0>();
  ptx::barrier();
  const ptx::SharedPtr sums = shared + wk * (Tile::BM * Tile::BN * 4);
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kColumnTiles; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = wm * (Tile::BM / Tile::WM) + i * 16 + half * 8 + lane / 4;
        const int column = wn * (Tile::BN / Tile::WN) + j * 8 + lane % 4 * 2;
        ptx::store_shared(
            sums + Tile::sum_at(row, column),
            ptx::Words2{static_cast<uint32_t>(acc[i][j][half * 2]), static_cast<uint32_t>(acc[i][j][half * 2 + 1])});
      }
  ptx::barrier();
  finish_block<int32_t, Tile, Tile::BM, Tile::BN>(args, shared, bm * Tile::BM, bn * Tile::BN);
}

// Two blocks of 128 threads on a multiprocessor, 64 × 64 of y a warp: 32 products for 8 ldmatrix.
using WideInt8Tile = Int8GemmTile<128, 128, 64, 2, 2, 1, 4>;
// For too few blocks of the wide one to fill the device: 64 × 64 of y a warp, and four warps share k. On 9.0 39 % of
// its loop's instructions multiply; with 64 × 32 a warp, two of which shared k, 30 %, for nvcc moved addresses about.
using MiddleInt8Tile = Int8GemmTile<64, 64, 256, 1, 1, 4, 3>;
// Few tokens: the weight is read once and nothing else counts. Eight warps share k, so that even N = 4096 gives 128
// blocks, each with 24 KiB of weight on the way.
using NarrowInt8Tile = Int8GemmTile<16, 32, 256, 1, 1, 8, 4>;

inline Int8Tile choose_int8_tile(const Int8LinearArgs& args) {
  if (args.m <= NarrowInt8Tile::BM) return Int8Tile::kNarrow;
  const int64_t wide = ceil_div<int64_t>(args.m, WideInt8Tile::BM) * ceil_div<int64_t>(args.n, WideInt8Tile::BN);
  return wide >= args.multiprocessors ? Int8Tile::kWide : Int8Tile::kMiddle;
}

template <class Tile>
void launch_int8_linear(const Int8LinearArgs& args, Stream stream) {
  const int64_t blocks = ceil_div<int64_t>(args.m, Tile::BM) * ceil_div<int64_t>(args.n, Tile::BN);
  launch("int8_linear", int8_linear_kernel<Tile>, {static_cast<unsigned>(blocks)}, Tile::kThreads, Tile::kSharedBytes,
         stream, args);
}

inline void run_int8_linear(const Int8LinearArgs& args, Stream stream, Int8Tile tile) {
  if (args.m == 0 || args.n == 0) return;
  if (tile == Int8Tile::kAuto) tile = choose_int8_tile(args);
  if (tile == Int8Tile::kWide) return launch_int8_linear<WideInt8Tile>(args, stream);
  if (tile == Int8Tile::kMiddle) return launch_int8_linear<MiddleInt8Tile>(args, stream);
  launch_int8_linear<NarrowInt8Tile>(args, stream);
}

}  // namespace tcompress::cuda
