// int8 linear layer with a 2:4 weight by mma.sp: half the products and, of the weight, five eighths of the bytes.
//
// The sparse operand of mma.sp is the one with 16 rows, so the features are the rows and the tokens the columns: a
// block computes the transpose of a tile of y, BF features by BM tokens, and writes it the right way round.
//
//   stage in shared memory:  a [BM tokens][BK], chunks swapped as in int8_linear.cuh
//                            units [BF / 16][BK / 64], as they lie in memory (two_four_linear.h): a lane reads its
//                            fragment with one load of 16 bytes, its positions with one of 4
//
//  1. cp.async brings the first STAGES - 1 stages.
//  2. For each stage: wait, one barrier, start the next copy. WK warps share the steps of 64 of k; one ldmatrix brings
//     all 64 of k for eight tokens.
//  3. The sums meet in shared memory, then the epilogue of int8_linear.
//
// Constraints: as int8_linear; compute capability 8.0 or above. Emulated; the instruction itself was not run on a GPU.
//
// Paper: Mishra et al., arXiv 2104.08378, section 3.
#pragma once

#include "epilogue.cuh"
#include "row_copier.cuh"
#include "two_four_linear.h"

namespace tcompress::cuda {

template <int kBF, int kBM, int kBK, int kWF, int kWM, int kWK, int kStages>
struct TwoFourTile {
  static constexpr int BF = kBF, BM = kBM, BK = kBK, WF = kWF, WM = kWM, WK = kWK, STAGES = kStages;
  static constexpr int kThreads = WF * WM * WK * kWarpSize;
  static constexpr int kFeatureTiles = BF / WF / 16, kTokenTiles = BM / WM / 8, kUnits = BK / kSparseSteps;
  static constexpr int kChunks = BK / 16, kTokenBytes = BM * BK;
  static constexpr int kStageBytes = kTokenBytes + BF / 16 * kUnits * kSparseUnitBytes;
  static constexpr int kSumBytes = WK * BM * BF * 4;
  static constexpr int kSharedBytes = kStageBytes * STAGES > kSumBytes ? kStageBytes * STAGES : kSumBytes;
  static_assert(kUnits % WK == 0 && BF % (16 * WF) == 0 && BM % (8 * WM) == 0);
  static_assert(kChunks == 4 || kChunks % 8 == 0);

  __device__ static constexpr int swizzled(int row, int chunk) {
    return row * BK + (kChunks == 4 ? chunk ^ ((row >> 1) & 3) : chunk ^ (row & 7)) * 16;
  }
  // Eight neighbours of a token stay together; the tokens of a fragment go to different banks.
  __device__ static constexpr int sum_at(int token, int feature) {
    return (token * BF + (feature ^ (token >> 1 & 3) * 8)) * 4;
  }
};

// Copies the units of one stage after the other: rows of them lie one behind the other.
template <class Tile>
struct UnitCopier {
  static constexpr int kRowChunks = Tile::kUnits * kSparseUnitBytes / 16, kAll = Tile::BF / 16 * kRowChunks;
  static constexpr int kPasses = ceil_div(kAll, Tile::kThreads);
  const uint8_t* from[kPasses];
  int left[kPasses];  // bytes of the row from this thread's next chunk on

  __device__ __forceinline__ UnitCopier(const void* packed, const TwoFourLayout& layout, int64_t first) {
    const int64_t row_bytes = layout.steps * kSparseUnitBytes;
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      const int id = p * Tile::kThreads + threadIdx.x, byte = id % kRowChunks * 16;
      const int64_t row = first + id / kRowChunks;  // features of a repeated row are not stored
      from[p] = static_cast<const uint8_t*>(packed) + (row < layout.rows ? row : layout.rows - 1) * row_bytes + byte;
      left[p] = static_cast<int>(row_bytes) - byte;
    }
  }

  __device__ __forceinline__ void copy_next(ptx::SharedPtr to) {
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      const int id = p * Tile::kThreads + threadIdx.x;
      if (kAll % Tile::kThreads != 0 && id >= kAll) break;
      ptx::cp_async16_once(to + id * 16, from[p], left[p] > 0);
      from[p] += kRowChunks * 16, left[p] -= kRowChunks * 16;
    }
  }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) two_four_linear_kernel(const __grid_constant__ Int8LinearArgs args) {
  const TwoFourLayout layout(args.n, args.k);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int wm = warp % Tile::WM, wf = warp / Tile::WM % Tile::WF, wk = warp / (Tile::WM * Tile::WF);
  const int64_t f_blocks = ceil_div<int64_t>(args.n, Tile::BF);
  const int64_t m0 = blockIdx.x / f_blocks * Tile::BM, f0 = blockIdx.x % f_blocks * Tile::BF;
  const ptx::SharedPtr shared = ptx::shared_base();
  const int stages = static_cast<int>(ceil_div<int64_t>(layout.steps, Tile::kUnits));
  const int first_token = wm * Tile::kTokenTiles * 8, first_tile = wf * Tile::kFeatureTiles;
  RowCopier<Tile, Tile::BM, false> tokens(args.a, m0, args.m, args.lda, args.k);
  UnitCopier<Tile> units(args.weight, layout, f0 / kSparseFeatures);
  const auto copy = [&](int stage) {
    if (stage < stages) {
      const ptx::SharedPtr to = shared + stage % Tile::STAGES * Tile::kStageBytes;
      tokens.copy_next(to);
      units.copy_next(to + Tile::kTokenBytes);
    }
    ptx::cp_async_commit();
  };

  // 1.
  for (int s = 0; s < Tile::STAGES - 1; ++s) copy(s);

  // 2.
  int32_t acc[Tile::kFeatureTiles][Tile::kTokenTiles][4] = {};
  for (int stage = 0; stage < stages; ++stage) {
    if (TC_PLANTED(kUnwaitedCopy))
      ptx::cp_async_wait<Tile::STAGES - 1>();
    else
      ptx::cp_async_wait<Tile::STAGES - 2>();
    if (!TC_PLANTED(kMissingBarrier)) ptx::barrier();
    copy(stage + Tile::STAGES - 1);
    const ptx::SharedPtr a_at = shared + stage % Tile::STAGES * Tile::kStageBytes, w_at = a_at + Tile::kTokenBytes;
#pragma unroll
    for (int u = 0; u < Tile::kUnits / Tile::WK; ++u) {
      const int unit = u * Tile::WK + wk;
      if (stage * Tile::kUnits + unit >= layout.steps) break;  // its positions are no positions
      uint32_t weight[Tile::kFeatureTiles][4], positions[Tile::kFeatureTiles];
#pragma unroll
      for (int i = 0; i < Tile::kFeatureTiles; ++i) {
        const ptx::SharedPtr at = w_at + ((first_tile + i) * Tile::kUnits + unit) * kSparseUnitBytes;
        const ptx::Words4 w = ptx::load_shared<ptx::Words4>(at + lane * 16);
        weight[i][0] = w.x, weight[i][1] = w.y, weight[i][2] = w.z, weight[i][3] = w.w;
        positions[i] = ptx::load_shared<uint32_t>(at + kSparseValueBytes + lane * 4);
      }
#pragma unroll
      for (int j = 0; j < Tile::kTokenTiles; ++j) {
        uint32_t a[4];
        const int token = first_token + j * 8 + lane % 8;
        ptx::ldmatrix_x4(a, a_at + Tile::swizzled(token, unit * 4 + lane / 8));
#pragma unroll
        for (int i = 0; i < Tile::kFeatureTiles; ++i) ptx::mma_sp_s8(acc[i][j], weight[i], a, positions[i]);
      }
    }
  }

  // 3.
  ptx::cp_async_wait<0>();
  ptx::barrier();
#pragma unroll
  for (int i = 0; i < Tile::kFeatureTiles; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kTokenTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int feature = (first_tile + i) * 16 + e / 2 * 8 + lane / 4;
        const int token = first_token + j * 8 + lane % 4 * 2 + e % 2;
        ptx::store_shared(shared + wk * Tile::BM * Tile::BF * 4 + Tile::sum_at(token, feature), acc[i][j][e]);
      }
  ptx::barrier();
  finish_block<int32_t, Tile, Tile::BM, Tile::BF>(args, shared, m0, f0);
}

constexpr int kTwoFourPackThreads = 128;

// One thread a lane of a unit.
__global__ void __launch_bounds__(kTwoFourPackThreads)
    two_four_pack_kernel(const __grid_constant__ TwoFourPackArgs args) {
  const TwoFourLayout layout(args.n, args.k);
  const int64_t id = static_cast<int64_t>(blockIdx.x) * kTwoFourPackThreads + threadIdx.x, unit = id / kWarpSize;
  if (unit >= layout.rows * layout.steps) return;
  const int lane = static_cast<int>(id % kWarpSize), g = lane / 4, t = lane % 4;
  const int64_t groups = ceil_div<int64_t>(args.k, 4), first_row = unit / layout.steps * kSparseFeatures;
  const int64_t first_group = unit % layout.steps * (kSparseSteps / 4);
  uint8_t* to = args.packed + unit * kSparseUnitBytes;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t row = first_row + g + r % 2 * 8;
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int kept = t * 4 + r / 2 * 16 + i;
      const int64_t group = first_group + kept / 2;
      const bool inside = row < args.n && group < groups;
      const int8_t value = inside ? args.values[(row * groups + group) * 2 + kept % 2] : int8_t{0};
      word |= (static_cast<uint32_t>(value) & 0xFF) << (8 * i);
    }
    reinterpret_cast<uint32_t*>(to)[lane * 4 + r] = word;
  }
  uint32_t positions = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t row = first_row + g + t % 2 * 8, group = first_group + t / 2 * 8 + i, at = row * groups + group;
    const bool inside = row < args.n && group < groups;
    const uint32_t nibble = inside ? args.index[at / 2] >> (at % 2 * 4) & 15 : 4u;  // 4: positions 0 and 1
    positions |= nibble << (4 * i);
  }
  reinterpret_cast<uint32_t*>(to + kSparseValueBytes)[lane] = positions;
}

using WideTwoFourTile = TwoFourTile<128, 128, 64, 2, 2, 1, 4>;
using MiddleTwoFourTile = TwoFourTile<64, 32, 64, 2, 2, 1, 4>;
// Eight tokens or fewer: eight warps share k.
using NarrowTwoFourTile = TwoFourTile<32, 8, 512, 1, 1, 8, 4>;

template <class Tile>
void launch_two_four_linear(const Int8LinearArgs& args, Stream stream) {
  const int64_t blocks = ceil_div<int64_t>(args.m, Tile::BM) * ceil_div<int64_t>(args.n, Tile::BF);
  launch("two_four_linear", two_four_linear_kernel<Tile>, {static_cast<unsigned>(blocks)}, Tile::kThreads,
         Tile::kSharedBytes, stream, args);
}

inline void run_two_four_linear(const Int8LinearArgs& args, Stream stream) {
  if (args.m == 0 || args.n == 0) return;
  if (args.m <= NarrowTwoFourTile::BM) return launch_two_four_linear<NarrowTwoFourTile>(args, stream);
  const int64_t wide = ceil_div<int64_t>(args.m, WideTwoFourTile::BM) * ceil_div<int64_t>(args.n, WideTwoFourTile::BF);
  if (wide >= args.multiprocessors) return launch_two_four_linear<WideTwoFourTile>(args, stream);
  launch_two_four_linear<MiddleTwoFourTile>(args, stream);
}

inline void run_two_four_pack(const TwoFourPackArgs& args, Stream stream) {
  const TwoFourLayout layout(args.n, args.k);
  const int64_t threads = layout.rows * layout.steps * kWarpSize;
  if (threads == 0) return;
  launch("two_four_pack", two_four_pack_kernel,
         {static_cast<unsigned>(ceil_div<int64_t>(threads, kTwoFourPackThreads))}, kTwoFourPackThreads, 0, stream,
         args);
}

}  // namespace tcompress::cuda
