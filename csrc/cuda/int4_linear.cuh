// int4 weight times 16-bit float activations by mma.sync, in the manner of Marlin.
//
//   a block: BM rows of x, 32 WN columns; WK warps share the steps of k       weight: units of 32 columns x 32 of k
//                                                                               (Int4Layout), a unit 16 bytes a lane
//   stage in shared memory:  x [BM][BK] of 16 bits, chunks swapped: chunk ^ (row % 8)
//                            units [WN][BK / 32], as they lie in memory
//
//  1. cp.async brings the first STAGES - 1 stages; the weight is read once, so the second-level cache lets go of it.
//  2. For each stage: wait, one barrier, start the next copy. A warp takes every WK-th unit of 32 of k:
//     a. its lane's 16 bytes, which hold the fragments of four column tiles for two products each
//     b. a mask and an or turn nibble q into the float 1024 + q (float16) or 128 + q (bfloat16); 1024 + zero point is
//        subtracted: q - zero, exact. No conversion, no table.
//     c. products with x, sums in float32
//     d. where the group of k ends: total += scale · sum. Scales meet the sums, not the weights: one rounding fewer.
//  3. The warps' totals meet in shared memory, then bias, activation, residual.
//
// Constraints: float16 or bfloat16; group a multiple of 32, or one for all K; x in rows of whole chunks of 16 bytes.
// Compute capability 8.0 or above. Not measured on a GPU.
//
// Paper: Frantar et al. (MARLIN), arXiv 2408.11743, section 3.
#pragma once

#include "epilogue.cuh"
#include "int4_linear.h"

namespace tcompress::cuda {

constexpr int kInt4Tiles = kInt4Columns / 8;  // mma tiles of a unit's columns

template <int kBM, int kBK, int kWN, int kWK, int kStages>
struct Int4Tile {
  static constexpr int BM = kBM, BK = kBK, WN = kWN, WK = kWK, STAGES = kStages, BN = kWN * kInt4Columns;
  static constexpr int kThreads = WN * WK * kWarpSize, kRowTiles = BM / 16, kUnits = BK / kInt4Steps;
  static constexpr int kChunks = BK / 8;  // of a row of x
  static constexpr int kXBytes = BM * BK * 2, kStageBytes = kXBytes + WN * kUnits * kInt4UnitBytes;
  static constexpr int kSumBytes = WK * BM * BN * 4;
  static constexpr int kSharedBytes = kStageBytes * STAGES > kSumBytes ? kStageBytes * STAGES : kSumBytes;
  static_assert(kUnits % WK == 0 && kChunks % 8 == 0 && (BM * kChunks) % kThreads == 0);
  static_assert((WN * kUnits * kWarpSize) % kThreads == 0);

  __device__ static constexpr int swizzled(int row, int chunk) { return row * BK * 2 + (chunk ^ (row & 7)) * 16; }
  // As in int8_linear.cuh.
  __device__ static constexpr int sum_at(int row, int column) { return (row * BN + (column ^ (row & 3) * 8)) * 4; }
};

template <class Tile>
__device__ __forceinline__ void copy_int4_stage(const Int4LinearArgs& args, const Int4Layout& layout, int64_t m0,
                                                int64_t column_block, int stage, ptx::SharedPtr to) {
  const char* x = static_cast<const char*>(args.x);
#pragma unroll
  for (int i = 0; i < Tile::BM * Tile::kChunks / Tile::kThreads; ++i) {
    const int id = i * Tile::kThreads + threadIdx.x, row = id / Tile::kChunks, chunk = id % Tile::kChunks;
    const int64_t m = m0 + row < args.m ? m0 + row : args.m - 1;  // nobody stores what comes of a repeated row
    const int64_t k = static_cast<int64_t>(stage) * Tile::BK + chunk * 8;
    ptx::cp_async16(to + Tile::swizzled(row, chunk), x + (m * args.ldx + k) * 2, k < args.k);
  }
#pragma unroll
  for (int i = 0; i < Tile::WN * Tile::kUnits * kWarpSize / Tile::kThreads; ++i) {
    const int id = i * Tile::kThreads + threadIdx.x, lane = id % kWarpSize;
    const int unit = id / kWarpSize % Tile::kUnits, wn = id / kWarpSize / Tile::kUnits;
    const int64_t step = static_cast<int64_t>(stage) * Tile::kUnits + unit, block = column_block + wn;
    const bool inside = step < layout.steps && block * kInt4Columns < layout.columns;
    ptx::cp_async16_once(to + Tile::kXBytes + (wn * Tile::kUnits + unit) * kInt4UnitBytes + lane * 16,
                         args.packed + (block * layout.steps + step) * kInt4UnitBytes + lane * 16, inside);
  }
}

template <bool kBFloat16>
struct Nibbles {
  static constexpr uint32_t kOnes = kBFloat16 ? 0x43004300u : 0x64006400u;  // 128, 1024: a nibble fits below
  // 128 + zero or 1024 + zero, twice
  __device__ __forceinline__ static uint32_t zero(uint32_t zero_point) { return kOnes | zero_point * 0x10001u; }
  // Register i of the fragments of two products.
  __device__ __forceinline__ static uint32_t weights(uint32_t word, int i, uint32_t zero) {
    const uint32_t biased = ptx::and_or(word >> (4 * i), 0x000F000Fu, kOnes);
    return kBFloat16 ? ptx::subtract_bfloat16s(biased, zero) : ptx::subtract_halves(biased, zero);
  }
};

template <class Tile, bool kBFloat16>
__global__ void __launch_bounds__(Tile::kThreads) int4_linear_kernel(const __grid_constant__ Int4LinearArgs args) {
  const Int4Layout layout(args.n, args.k, args.group);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int wn = warp % Tile::WN, wk = warp / Tile::WN;
  const int64_t n_blocks = ceil_div<int64_t>(layout.columns, Tile::BN);
  const int64_t m0 = blockIdx.x / n_blocks * Tile::BM, n0 = blockIdx.x % n_blocks * Tile::BN;
  const int64_t column = n0 + wn * kInt4Columns;  // of this warp
  const bool has_columns = column < layout.columns;
  const ptx::SharedPtr shared = ptx::shared_base();
  const int stages = static_cast<int>(ceil_div<int64_t>(layout.steps, Tile::kUnits));
  // Steps of k in a group; all of them where there is one group.
  const int group_steps = static_cast<int>(layout.groups > 1 ? args.group / kInt4Steps : layout.steps);
  const float* scales = reinterpret_cast<const float*>(args.packed + layout.scale) + (has_columns ? column : 0);
  const uint8_t* zeros = args.packed + layout.zero + (has_columns ? column : 0);
  const auto copy = [&](int stage) {
    if (stage < stages)
      copy_int4_stage<Tile>(args, layout, m0, n0 / kInt4Columns, stage,
                            shared + stage % Tile::STAGES * Tile::kStageBytes);
    ptx::cp_async_commit();
  };

  // 1.
  for (int s = 0; s < Tile::STAGES - 1; ++s) copy(s);

  float total[Tile::kRowTiles][kInt4Tiles][4] = {}, sum[Tile::kRowTiles][kInt4Tiles][4] = {};
  float scale[kInt4Tiles][2] = {};
  uint32_t zero[kInt4Tiles] = {};
  int group = -1;
  // d.
  const auto flush = [&] {
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < kInt4Tiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          total[i][j][e] = ptx::fused_multiply_add(sum[i][j][e], scale[j][e % 2], total[i][j][e]);
          sum[i][j][e] = 0.f;
        }
  };

  // 2.
  for (int stage = 0; stage < stages; ++stage) {
    if (TC_PLANTED(kUnwaitedCopy))
      ptx::cp_async_wait<Tile::STAGES - 1>();
    else
      ptx::cp_async_wait<Tile::STAGES - 2>();
    if (!TC_PLANTED(kMissingBarrier)) ptx::barrier();
    copy(stage + Tile::STAGES - 1);
    const ptx::SharedPtr x_at = shared + stage % Tile::STAGES * Tile::kStageBytes;
    const ptx::SharedPtr w_at = x_at + Tile::kXBytes + wn * Tile::kUnits * kInt4UnitBytes + lane * 16;
#pragma unroll
    for (int u = 0; u < Tile::kUnits / Tile::WK; ++u) {
      const int unit = u * Tile::WK + wk, step = stage * Tile::kUnits + unit;
      if (step >= layout.steps) break;
      const int now = step / group_steps + (TC_PLANTED(kOffByOne) && step % group_steps == group_steps - 1 &&
                                            (step + 1) / group_steps < layout.groups);
      if (now != group) {
        if (group >= 0) flush();
        group = now;
#pragma unroll
        for (int j = 0; j < kInt4Tiles; ++j) {
          const float* at = scales + group * layout.columns + j * 8 + lane % 4 * 2;
          scale[j][0] = at[0], scale[j][1] = at[1];
          zero[j] = Nibbles<kBFloat16>::zero(zeros[group * layout.columns + j * 8 + lane / 4]);
        }
      }
      // a.
      const ptx::Words4 loaded = ptx::load_shared<ptx::Words4>(w_at + unit * kInt4UnitBytes);
      const uint32_t words[kInt4Tiles] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t x[Tile::kRowTiles][4];
#pragma unroll
        for (int i = 0; i < Tile::kRowTiles; ++i)
          ptx::ldmatrix_x4(x[i], x_at + Tile::swizzled(i * 16 + lane % 16, unit * 4 + half * 2 + lane / 16));
#pragma unroll
        for (int j = 0; j < kInt4Tiles; ++j) {
          // b.
          const uint32_t b0 = Nibbles<kBFloat16>::weights(words[j], half * 2, zero[j]);
          const uint32_t b1 = Nibbles<kBFloat16>::weights(words[j], half * 2 + 1, zero[j]);
          // c.
#pragma unroll
          for (int i = 0; i < Tile::kRowTiles; ++i) {
            if (kBFloat16)
              ptx::mma_bf16(sum[i][j], x[i], b0, b1);
            else
              ptx::mma_f16(sum[i][j], x[i], b0, b1);
          }
        }
      }
    }
  }
  flush();

  // 3.
  ptx::cp_async_wait<0>();
  ptx::barrier();
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < kInt4Tiles; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        ptx::store_shared(shared + wk * Tile::BM * Tile::BN * 4 +
                              Tile::sum_at(i * 16 + half * 8 + lane / 4, wn * kInt4Columns + j * 8 + lane % 4 * 2),
                          ptx::Words2{ptx::to_bits(total[i][j][half * 2]), ptx::to_bits(total[i][j][half * 2 + 1])});
  ptx::barrier();
  finish_block<float, Tile, Tile::BM, Tile::BN>(args, shared, m0, n0);
}

constexpr int kPackThreads = 128;

// One thread a word, then one a scale.
__global__ void __launch_bounds__(kPackThreads) int4_pack_kernel(const __grid_constant__ Int4PackArgs args) {
  const Int4Layout layout(args.n, args.k, args.group);
  const int64_t words = layout.columns * layout.steps * (kInt4Steps / 8), scales = layout.groups * layout.columns;
  const int64_t id = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x, row_bytes = (args.k + 1) / 2;
  if (id < words) {
    const int tile = static_cast<int>(id % kInt4Tiles), lane = static_cast<int>(id / kInt4Tiles % kWarpSize);
    const int64_t unit = id / (kInt4Tiles * kWarpSize);
    const int64_t n = unit / layout.steps * kInt4Columns + tile * 8 + lane / 4;
    const int64_t k0 = unit % layout.steps * kInt4Steps + lane % 4 * 2;
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t k = k0 + i % 4 * 8 + i / 4;
      const uint32_t q = n < args.n && k < args.k ? args.weight[n * row_bytes + k / 2] >> (k % 2 * 4) & 15 : 0;
      word |= q << (4 * i);
    }
    reinterpret_cast<uint32_t*>(args.packed)[id] = word;
  } else if (id < words + scales) {
    const int64_t at = id - words, n = at % layout.columns, group = at / layout.columns;
    const bool inside = n < args.n;
    const int64_t from = n * layout.groups + group;
    reinterpret_cast<float*>(args.packed + layout.scale)[at] =
        inside ? load_element(args.scale, args.scale_type, from) : 0.f;
    args.packed[layout.zero + at] = inside && args.zero_point != nullptr ? args.zero_point[from] : 8;
  }
}

// Few tokens: eight warps share k, 32 columns a block, 12 KiB of weight and 24 KiB of x on the way.
using NarrowInt4Tile = Int4Tile<16, 256, 1, 8, 4>;
// Many: 64 rows, 128 columns.
using WideInt4Tile = Int4Tile<64, 64, 4, 1, 4>;

template <class Tile>
void launch_int4_linear(const Int4LinearArgs& args, Stream stream) {
  const int64_t blocks = ceil_div<int64_t>(args.m, Tile::BM) * ceil_div<int64_t>(args.n, Tile::BN);
  launch("int4_linear",
         args.type == DType::kBFloat16 ? int4_linear_kernel<Tile, true> : int4_linear_kernel<Tile, false>,
         {static_cast<unsigned>(blocks)}, Tile::kThreads, Tile::kSharedBytes, stream, args);
}

inline void run_int4_linear(const Int4LinearArgs& args, Stream stream) {
  if (args.m == 0 || args.n == 0) return;
  if (args.m <= NarrowInt4Tile::BM)
    launch_int4_linear<NarrowInt4Tile>(args, stream);
  else
    launch_int4_linear<WideInt4Tile>(args, stream);
}

inline void run_int4_pack(const Int4PackArgs& args, Stream stream) {
  const Int4Layout layout(args.n, args.k, args.group);
  const int64_t items = layout.columns * layout.steps * (kInt4Steps / 8) + layout.groups * layout.columns;
  if (items == 0) return;
  launch("int4_pack", int4_pack_kernel, {static_cast<unsigned>(ceil_div<int64_t>(items, kPackThreads))}, kPackThreads,
         0, stream, args);
}

}  // namespace tcompress::cuda
