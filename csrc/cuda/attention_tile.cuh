// How attention.cuh cuts its work: tiles in shared memory, which blocks of keys a block of queries takes, the copies.
#pragma once

#include "attention_prepare.cuh"

namespace tcompress::cuda {

constexpr int kAttentionWarps = 4, kAttentionThreads = kAttentionWarps * kWarpSize;

template <int kHead>
struct AttentionTile {
  static constexpr int kQueries = query_block(kHead), kRowTiles = kQueries / kAttentionWarps / 16;
  static constexpr int kQueryBytes = kQueries * kHead, kKeyBytes = kKeyBlock * kHead, kValueBytes = 2 * kKeyBytes;
  static constexpr int kStageBytes = kKeyBytes + kValueBytes;
  // Two of the widest would not fit into the 99 KiB of 8.6 and 8.9.
  static constexpr int kStages = kHead == 256 ? 1 : 2;
  static constexpr int kScalesAt = kQueryBytes + kStages * kStageBytes;  // of the queries
  static constexpr int kShiftsAt = kScalesAt + kQueries * 4;             // what smoothing K took from their scores
  static constexpr int kBoundsAt = kShiftsAt + kQueries * 4, kSharedBytes = kBoundsAt + 16;

  // Offset of a chunk in rows of kHead bytes (Q, K) or 2 kHead bytes (V). Adding eight rows, or eight chunks, leaves
  // the swizzle as it is; a lane's other chunks differ from its first in bits that an exclusive or sets. All tiles
  // start at multiples of 1024, so it may be taken of the whole address.
  template <int kRowBytes>
  __device__ static constexpr int swizzled(int row, int chunk) {
    return row * kRowBytes + (kRowBytes == 64 ? chunk ^ ((row >> 1) & 3) : chunk ^ (row & 7)) * 16;
  }
  static_assert(kQueryBytes % 1024 == 0 && kKeyBytes % 1024 == 0 && kStageBytes % 1024 == 0);
};

// The address of `chunk` further on in the row; the row's first chunks are those of `at`, an even number of them a
// lane.
__device__ __forceinline__ ptx::SharedPtr chunk_at(ptx::SharedPtr at, int chunk) {
  return (at ^ (chunk % 8 * 16)) + chunk / 8 * 128;
}

// Which blocks of keys a block of queries takes: first … last, of them plain_first … plain_last without masking.
struct KeySteps {
  int first, plain_first, plain_last, last;

  __device__ __forceinline__ KeySteps(const AttentionArgs& args, int64_t row, int rows, bool may_be_plain) {
    const int64_t low = row + args.offset, high = low + rows - 1;  // positions
    const auto clamped = [&](int64_t key) { return key < 0 ? 0 : key < args.skv ? key : args.skv; };
    const int64_t begin = args.left >= 0 ? clamped(low - args.left) : 0;
    const int64_t end = args.right >= 0 ? clamped(high + args.right + 1) : args.skv;
    const int64_t all_begin = args.left >= 0 ? clamped(high - args.left) : 0;
    const int64_t all_end = args.right >= 0 ? clamped(low + args.right + 1) : args.skv;
    first = static_cast<int>(begin / kKeyBlock);
    last = end > begin ? static_cast<int>(ceil_div<int64_t>(end, kKeyBlock)) : first;
    plain_first = static_cast<int>(ceil_div<int64_t>(all_begin, kKeyBlock));
    plain_last = static_cast<int>(all_end / kKeyBlock);
    if (plain_last <= plain_first || last == first || !may_be_plain) plain_first = plain_last = last;
  }
};

// What a block works on. The last block of a head first: with a causal limit it has the most to do.
struct BlockOfQueries {
  int m0, bh, b, h, kv;

  __device__ __forceinline__ BlockOfQueries(const AttentionArgs& args, unsigned id, int queries) {
    const int heads = static_cast<int>(args.heads), m_blocks = static_cast<int>((args.sq + queries - 1) / queries);
    bh = static_cast<int>(id / m_blocks);
    m0 = (m_blocks - 1 - static_cast<int>(id % m_blocks)) * queries;
    b = bh / heads;
    h = bh % heads;
    kv = b * static_cast<int>(args.kv_heads) + h / (heads / static_cast<int>(args.kv_heads));
  }
};

// This thread's share of copying tiles of kRows rows of kRowBytes, tile after tile: the same chunk of every kPass-th
// row. kWhole: a padded tensor, nothing is cut off. A pointer that moves on costs a third of the instructions of an
// address.
template <int kHead, int kRows, int kRowBytes, bool kWhole>
struct TileCopier {
  static constexpr int kChunks = kRowBytes / 16, kPass = kAttentionThreads / kChunks;
  const char* from;
  int left;  // rows of the tensor from this thread's on; 0 beyond its width

  // From row `first` on, of `rows` of `width` bytes.
  __device__ __forceinline__ TileCopier(const char* data, int64_t stride, int first, int rows, int width) {
    const int row = threadIdx.x / kChunks, byte = threadIdx.x % kChunks * 16;
    from = data + (first + row) * stride + byte;
    left = byte < width ? rows - first - row : 0;
  }

  // `to`: the tile; `stride`: bytes.
  __device__ __forceinline__ void copy_next(ptx::SharedPtr to, unsigned thread, int64_t stride) {
    const char* source = from;
    to += AttentionTile<kHead>::template swizzled<kRowBytes>(thread / kChunks, thread % kChunks);
#pragma unroll
    for (int p = 0; p < kRows / kPass; ++p) {
      // rows four apart, in the widest tile, differ in one bit of the swizzle
      const ptx::SharedPtr at = kPass % 8 == 0 ? to : to ^ (p * kPass % 8 * 16);
      ptx::cp_async16(at + p * kPass * kRowBytes, source, kWhole || left > p * kPass);
      source += kPass * stride;
    }
    static_assert(kPass % 4 == 0);
    from += kRows * stride;
    left -= kRows;
  }
};

}  // namespace tcompress::cuda
