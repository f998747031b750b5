// Fused int8 attention by mma.sync: Q Kᵀ in int8, P V in 16-bit floats with sums in float32, blockwise softmax.
//
//   a block: 64 or 128 queries of one head, four warps, 16 or 32 queries (kRowTiles of 16) each; 64 keys a step
//
//   keys  0 ........ first ...... plain_first ............ plain_last ...... last ........ Skv
//            skipped |   masked    |  every query sees all  |    masked     |  skipped
//
//   shared memory:   Q [queries][D bytes]  |  stage 0: K [64][D bytes], V [64][2 D bytes]  |  stage 1
//   chunks of 16 bytes swapped within a row as in int8_linear.cuh; cp.async fills one stage while the other is used
//   (heads of 256: there is one)
//
//  1. Load Q; copy the first step's K and V.
//  2. Each step: wait, one barrier, start the next copy. x = Q Kᵀ, exact: |x| <= 127 · 127 · 256 < 2^22. The sums start
//     at the bits of 1.5 · 2^23, so that their bits are the float 1.5 · 2^23 + x: the conversion costs nothing.
//  3. plain: the maximum is taken of x before scaling, then p = 2^(x c - top) is one fused multiply-add and one exp2;
//     what that rounds, up to 0.75 c, is the same for all keys of the step. masked: s = x c + mask, -inf where a query
//     does not see a key.
//  4. `top` follows the running maximum only when it rises by more than 2^8 (P in float16 holds 2^8): the output is
//     multiplied in few steps instead of all.
//  5. O += P V, and the sums of P are one more product, with ones: no additions, no shuffles at the end.
//  6. Divide by the sums; zeros where a query has seen no key.
//
// Constraints (`unsupported` of the op says the same): D and Dv at most 256, bits 8, no softcap. v: attention_takes_v.
// Heads are padded to 64, 128 or 256. Compute capability 8.0 or above. A value token that is not finite spoils all
// queries of the blocks that touch it, seen or not (0 · NaN). Not measured on a GPU.
//
// Papers: Milakov & Gimelshein, arXiv 1805.02867, section 3; Dao, arXiv 2307.08691, section 3.1; Zhang et al.
// (SageAttention), arXiv 2410.02367, sections 4.2 and 4.3.
#pragma once

#include "attention_prepare.cuh"

namespace tcompress::cuda {

constexpr int kAttentionWarps = 4, kAttentionThreads = kAttentionWarps * kWarpSize;
constexpr int kKeyTiles = kKeyBlock / 8;  // mma tiles of a step's keys
constexpr float kBias = 12582912.f;       // 1.5 · 2^23
constexpr int32_t kBiasBits = 0x4B400000;
constexpr float kRise = 8.f;             // of `top`, in exponents of 2
constexpr float kLowestMask = -1.0e38f;  // a finite entry of a mask does not hide its key
constexpr float kLn2 = 0.6931471805599453f;

template <int kHead>
struct AttentionTile {
  static constexpr int kQueries = query_block(kHead), kRowTiles = kQueries / kAttentionWarps / 16;
  static constexpr int kQueryBytes = kQueries * kHead, kKeyBytes = kKeyBlock * kHead, kValueBytes = 2 * kKeyBytes;
  static constexpr int kStageBytes = kKeyBytes + kValueBytes;
  // Two of the widest would not fit into the 99 KiB of 8.6 and 8.9.
  static constexpr int kStages = kHead == 256 ? 1 : 2;
  static constexpr int kScalesAt = kQueryBytes + kStages * kStageBytes;  // of the queries
  static constexpr int kBoundsAt = kScalesAt + kQueries * 4, kSharedBytes = kBoundsAt + 16;

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

template <int kHead, bool kBFloat16, bool kHasMask>
struct AttentionWarp {
  using Tile = AttentionTile<kHead>;
  static constexpr int kRowTiles = Tile::kRowTiles, kValueTiles = kHead / 8, kSteps = kHead / 32;

  // Q and its scales in registers; wider heads read them anew each step.
  static constexpr bool kHoldQ = kHead == 64;

  const AttentionArgs& args;
  unsigned held_thread;
  float out[kRowTiles][kValueTiles][4] = {};
  float sums[kRowTiles][4] = {};  // of P: columns alike
  float top[kRowTiles][2];
  float held_scale[kHoldQ ? kRowTiles : 1][2];
  uint32_t held[kHoldQ ? kSteps : 1][kRowTiles][4];

  __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if (kBFloat16)
      ptx::mma_bf16(d, a, b0, b1);
    else
      ptx::mma_f16(d, a, b0, b1);
  }

  // Where registers are scarce the places of a thread are computed in each step from its number, read again.
  __device__ __forceinline__ unsigned thread() const { return kHoldQ ? held_thread : ptx::thread_anew(); }
  __device__ __forceinline__ static int warp_row(unsigned thread) { return thread / kWarpSize * kRowTiles * 16; }
  // This lane's first row, then + 8, + 16, …
  __device__ __forceinline__ static int row_of(unsigned thread) { return warp_row(thread) + thread % kWarpSize / 4; }

  __device__ __forceinline__ void load_q(uint32_t (&q)[kRowTiles][4], int step, unsigned thread) {
    const unsigned lane = thread % kWarpSize;
    const ptx::SharedPtr q_at =
        ptx::shared_base() + warp_row(thread) * kHead + Tile::template swizzled<kHead>(lane % 16, lane / 16);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) ptx::ldmatrix_x4(q[i], chunk_at(q_at, step * 2) + i * 16 * kHead);
  }
  __device__ __forceinline__ void hold_q() {
#pragma unroll
    for (int step = 0; step < (kHoldQ ? kSteps : 0); ++step) load_q(held[step], step, held_thread);
#pragma unroll
    for (int i = 0; i < (kHoldQ ? kRowTiles : 0); ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) held_scale[i][half] = load_scale(i, half, held_thread);
  }
  __device__ __forceinline__ static float load_scale(int i, int half, unsigned thread) {
    return ptx::load_shared<float>(ptx::shared_base() + Tile::kScalesAt + (row_of(thread) + i * 16 + half * 8) * 4);
  }
  __device__ __forceinline__ float q_scale(int i, int half, unsigned thread) const {
    return kHoldQ ? held_scale[kHoldQ ? i : 0][half] : load_scale(i, half, thread);
  }

  // 2.
  __device__ __forceinline__ void scores(int32_t (&x)[kRowTiles][kKeyTiles][4], ptx::SharedPtr stage, unsigned thread) {
    const unsigned lane = thread % kWarpSize;
    const ptx::SharedPtr k_at = stage + Tile::template swizzled<kHead>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    const int32_t bias[4] = {kBiasBits, kBiasBits, kBiasBits, kBiasBits};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t loaded[kRowTiles][4];
      if (!kHoldQ) load_q(loaded, step, thread);
      const uint32_t (&q)[kRowTiles][4] = kHoldQ ? held[kHoldQ ? step : 0] : loaded;
#pragma unroll
      for (int j = 0; j < kKeyTiles; j += 2) {
        uint32_t k[4];
        ptx::ldmatrix_x4(k, chunk_at(k_at, step * 2) + j * 8 * kHead);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (step == 0)
              ptx::mma_s8(x[i][j + e], q[i], k[2 * e], k[2 * e + 1], bias);
            else
              ptx::mma_s8(x[i][j + e], q[i], k[2 * e], k[2 * e + 1], x[i][j + e]);
          }
      }
    }
  }

  // Scores in place of x: scaled, masked, as the bits of floats.
  __device__ __forceinline__ void mask_scores(int32_t (&x)[kRowTiles][kKeyTiles][4], int first_key, float k_scale,
                                              unsigned thread) {
    const BlockOfQueries at(args, ptx::block_anew(), Tile::kQueries);
    const int lane = static_cast<int>(thread % kWarpSize), row = at.m0 + row_of(thread);
    const int column = lane % 4 * 2;
    const int keys = static_cast<int>(args.skv) - first_key + (TC_PLANTED(kOffByOne) ? 1 : 0);
    const int left = static_cast<int>(args.left), right = static_cast<int>(args.right);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int m = row + i * 16 + half * 8, position = m + static_cast<int>(args.offset) - first_key;
        const float c = q_scale(i, half, thread) * k_scale;
        // the keys that it sees, counted from this lane's first
        int end = right >= 0 ? position + right + 1 : keys;
        if (TC_PLANTED(kWrongMask)) ++end;
        const int high = (end < keys ? end : keys) - column;
        const int low = left >= 0 ? position - left - column : -column;
        const int64_t entry = at.b * args.mask.stride_b + at.h * args.mask.stride_h + m * args.mask.stride_m +
                              static_cast<int64_t>(first_key + column) * args.mask.stride_n;
        const bool has_mask = kHasMask && m < args.sq;
#pragma unroll
        for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int key = j * 8 + e;
            bool seen = key >= low && key < high;
            float s = (ptx::from_bits(static_cast<uint32_t>(x[i][j][half * 2 + e])) - kBias) * c;
            if (has_mask && seen) {
              const int64_t one = entry + key * args.mask.stride_n;
              if (args.mask.boolean) {
                seen = static_cast<const uint8_t*>(args.mask.data)[one] != 0;
              } else {
                const float added = load_element(args.mask.data, args.mask.type, one), scaled = added * kLog2E;
                seen = added != -INFINITY;
                s += scaled < kLowestMask ? kLowestMask : scaled;  // NaN fails the comparison and stays
              }
            }
            x[i][j][half * 2 + e] = static_cast<int32_t>(ptx::to_bits(seen ? s : -INFINITY));
          }
      }
  }

  // 3 and 4: x to the exponents' products; `top` and what belongs to it.
  template <bool kMasked>
  __device__ __forceinline__ void raise(const int32_t (&x)[kRowTiles][kKeyTiles][4], float k_scale, unsigned thread) {
    float next[kRowTiles][2];
    bool rises = false;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = ptx::from_bits(static_cast<uint32_t>(x[i][0][half * 2]));
#pragma unroll
        for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (j + e > 0) most = ptx::maximum(most, ptx::from_bits(static_cast<uint32_t>(x[i][j][half * 2 + e])));
        most = ptx::maximum(most, ptx::shuffle_xor(most, 1));
        most = ptx::maximum(most, ptx::shuffle_xor(most, 2));
        if (!kMasked) most = (most - kBias) * (q_scale(i, half, thread) * k_scale);
        next[i][half] = most;
        rises |= most > top[i][half] + kRise;
      }
    if (!ptx::any(rises)) return;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool rise = next[i][half] > top[i][half] + kRise;
        const float higher = rise ? next[i][half] : top[i][half];
        float keep = ptx::exp2_approximate(top[i][half] - higher);  // 1 where it stays
        if (kMasked && higher == -INFINITY) keep = 1.f;
        top[i][half] = higher;
        sums[i][half * 2] *= keep;  // the next column holds the same, and nobody reads it
#pragma unroll
        for (int j = 0; j < kValueTiles; ++j) out[i][j][half * 2] *= keep, out[i][j][half * 2 + 1] *= keep;
      }
  }

  // x of a row's two neighbours to P, packed.
  template <bool kMasked>
  __device__ __forceinline__ uint32_t weights(int32_t x0, int32_t x1, float c, float minus_top) {
    float s0 = ptx::from_bits(static_cast<uint32_t>(x0)), s1 = ptx::from_bits(static_cast<uint32_t>(x1));
    s0 = kMasked ? s0 + minus_top : ptx::fused_multiply_add(s0, c, minus_top);
    s1 = kMasked ? s1 + minus_top : ptx::fused_multiply_add(s1, c, minus_top);
    s0 = ptx::exp2_approximate(s0), s1 = ptx::exp2_approximate(s1);
    return kBFloat16 ? ptx::pack_bfloat16(s0, s1) : ptx::pack_half(s0, s1);
  }

  template <bool kMasked>
  __device__ __forceinline__ void step(ptx::SharedPtr stage, int block, float k_scale, unsigned thread) {
    int32_t x[kRowTiles][kKeyTiles][4];
    const unsigned lane = thread % kWarpSize;
    scores(x, stage, thread);
    if (kMasked) mask_scores(x, block * kKeyBlock, k_scale, thread);
    raise<kMasked>(x, k_scale, thread);
    float c[kRowTiles][2], minus_top[kRowTiles][2];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float t = top[i][half];
        c[i][half] = q_scale(i, half, thread) * k_scale;
        minus_top[i][half] = kMasked ? (t == -INFINITY ? 0.f : -t) : -ptx::fused_multiply_add(kBias, c[i][half], t);
      }
    // 5.
    const ptx::SharedPtr v_at = stage + Tile::kKeyBytes + Tile::template swizzled<2 * kHead>(lane % 16, lane / 16);
    const uint32_t one = kBFloat16 ? 0x3F803F80u : 0x3C003C00u;
#pragma unroll
    for (int k = 0; k < kKeyBlock / 16; ++k) {
      uint32_t p[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int32_t (&tile)[4] = x[i][k * 2 + e / 2];
          p[i][e] = weights<kMasked>(tile[e % 2 * 2], tile[e % 2 * 2 + 1], c[i][e % 2], minus_top[i][e % 2]);
        }
        mma(sums[i], p[i], one, one);
      }
#pragma unroll
      for (int j = 0; j < kValueTiles; j += 2) {
        uint32_t v[4];
        ptx::ldmatrix_x4_transposed(v, chunk_at(v_at, j) + k * 16 * 2 * kHead);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          mma(out[i][j], p[i], v[0], v[1]);
          mma(out[i][j + 1], p[i], v[2], v[3]);
        }
      }
    }
  }

  // 6.
  __device__ __forceinline__ void store() {
    // computed anew, so that it need not live in registers through the loops
    const BlockOfQueries block(args, ptx::block_anew(), Tile::kQueries);
    const AttentionLayout layout(args);
    const int lane = threadIdx.x % kWarpSize, row = block.m0 + row_of(threadIdx.x);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t m = row + i * 16 + half * 8;
        if (m >= args.sq) continue;
        const float total = sums[i][half * 2];
        const bool empty = top[i][half] == -INFINITY && total == 0.f;  // a sum of NaN is not empty
        const float factor = empty ? 0.f : ptx::divide(1.f, total);
        const int64_t at = ((block.b * args.sq + m) * args.heads + block.h) * args.dv;
#pragma unroll
        for (int j = 0; j < kValueTiles; ++j) {
          const int column = j * 8 + lane % 4 * 2;
          const float y0 = out[i][j][half * 2] * factor, y1 = out[i][j][half * 2 + 1] * factor;
          store_pair(element_at(args.out, args.type, at + column), y0, y1, static_cast<int>(args.dv) - column);
        }
        if (args.lse != nullptr && lane % 4 == 0) {
          const float shift = part<float>(args.workspace, layout.shift)[block.bh * layout.sqp + m];
          args.lse[block.bh * args.sq + m] =
              empty ? -INFINITY : (top[i][half] + ptx::log2_approximate(total)) * kLn2 + args.scale * shift;
        }
      }
  }

  __device__ __forceinline__ void store_pair(char* at, float y0, float y1, int count) {
    if (args.type == DType::kFloat32) {
      if (count > 0) ptx::store_global(at, y0);
      if (count > 1) ptx::store_global(at + 4, y1);
      return;
    }
    const uint32_t both = args.type == DType::kFloat16 ? ptx::pack_half(y0, y1) : ptx::pack_bfloat16(y0, y1);
    if (count > 1 && args.dv % 2 == 0) {
      ptx::store_global(at, both);
    } else {
      if (count > 0) ptx::store_global(at, static_cast<uint16_t>(both));
      if (count > 1) ptx::store_global(at + 2, static_cast<uint16_t>(both >> 16));
    }
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

template <int kHead, bool kBFloat16, bool kHasMask>
__global__ void __launch_bounds__(kAttentionThreads) attention_kernel(const __grid_constant__ AttentionArgs args) {
  using Tile = AttentionTile<kHead>;
  const AttentionLayout layout(args);
  const BlockOfQueries at(args, blockIdx.x, Tile::kQueries);
  const KeySteps steps(args, at.m0, Tile::kQueries, !kHasMask);
  const ptx::SharedPtr q_at = ptx::shared_base(), stages = q_at + Tile::kQueryBytes;
  const int64_t q_row = at.bh * layout.sqp + at.m0;
  const char* k = part<char>(args.workspace, layout.k) + at.kv * layout.skp * kHead;
  const float* k_scale = part<float>(args.workspace, layout.k_scale) + at.kv * (layout.skp / kKeyBlock) + steps.first;
  const char* v =
      element_at(args.v.data, args.v_type, at.b * args.v.stride_b + (at.kv - at.b * args.kv_heads) * args.v.stride_h);

  const int skv = static_cast<int>(args.skv), dv = static_cast<int>(args.dv);
  TileCopier<kHead, kKeyBlock, kHead, true> keys(k, kHead, steps.first * kKeyBlock, skv, kHead);
  TileCopier<kHead, kKeyBlock, 2 * kHead, false> values(v, args.v.stride_s * 2, steps.first * kKeyBlock, skv, 2 * dv);
  // The bounds of the loops wait in shared memory: the registers are full.
  const ptx::SharedPtr bounds = q_at + Tile::kBoundsAt;
  if (threadIdx.x == 0) {
    ptx::store_shared(bounds, steps.plain_first);
    ptx::store_shared(bounds + 4, steps.plain_last);
    ptx::store_shared(bounds + 8, steps.last);
  }
  const auto plain_first = [&] { return ptx::load_shared<int>(bounds); };
  const auto plain_last = [&] { return ptx::load_shared<int>(bounds + 4); };
  const auto last = [&] { return ptx::load_shared<int>(bounds + 8); };
  const auto copy_block = [&](int block, unsigned thread) {
    const ptx::SharedPtr stage = stages + static_cast<unsigned>(block) % Tile::kStages * Tile::kStageBytes;
    keys.copy_next(stage, thread, kHead);
    values.copy_next(stage + Tile::kKeyBytes, thread, ptx::opaque(args.v.stride_s) * 2);
    ptx::cp_async_commit();
  };
  const auto arrive = [&](int block, unsigned thread) {
    if (Tile::kStages == 1 && block > steps.first) {
      ptx::barrier();  // all warps have left the only stage
      copy_block(block, thread);
    }
    if (!TC_PLANTED(kUnwaitedCopy)) ptx::cp_async_wait<0>();
    if (!TC_PLANTED(kMissingBarrier)) ptx::barrier();
    if (Tile::kStages == 2 && block + 1 < last()) copy_block(block + 1, thread);
    return stages + static_cast<unsigned>(block) % Tile::kStages * Tile::kStageBytes;
  };

  // 1.
  TileCopier<kHead, Tile::kQueries, kHead, true> queries(part<char>(args.workspace, layout.q) + q_row * kHead, kHead, 0,
                                                         Tile::kQueries, kHead);
  queries.copy_next(q_at, threadIdx.x, kHead);
  if (steps.first < steps.last) copy_block(steps.first, threadIdx.x);
  AttentionWarp<kHead, kBFloat16, kHasMask> state{args, threadIdx.x};
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) state.top[i][half] = -INFINITY;
  if (threadIdx.x < Tile::kQueries)
    ptx::store_shared(q_at + Tile::kScalesAt + threadIdx.x * 4,
                      part<float>(args.workspace, layout.q_scale)[q_row + threadIdx.x]);
  ptx::cp_async_commit();
  if (state.kHoldQ) ptx::cp_async_wait<0>();
  ptx::barrier();
  state.hold_q();

  int block = steps.first;
#pragma unroll 1
  for (int round = 0; round < 2; ++round) {
    while (block < (round == 0 ? plain_first() : last())) {
      const unsigned thread = state.thread();
      const float scale = *k_scale++;
      state.template step<true>(arrive(block, thread), block, scale, thread);
      ++block;
    }
    if constexpr (!kHasMask) {
      while (block < plain_last()) {
        const unsigned thread = state.thread();
        const float scale = *k_scale++;
        state.template step<false>(arrive(block, thread), block, scale, thread);
        ++block;
      }
    }
  }
  state.store();
}

template <int kHead>
void launch_attention(const AttentionArgs& args, const AttentionLayout& layout, Stream stream) {
  using Tile = AttentionTile<kHead>;
  prepare_attention<kHead>(args, layout, stream);
  const unsigned blocks = static_cast<unsigned>(args.batch * args.heads * (layout.sqp / Tile::kQueries));
  const bool bfloat16 = args.v_type == DType::kBFloat16;
  const auto kernel = args.mask.data != nullptr
                          ? (bfloat16 ? attention_kernel<kHead, true, true> : attention_kernel<kHead, false, true>)
                          : (bfloat16 ? attention_kernel<kHead, true, false> : attention_kernel<kHead, false, false>);
  launch("attention", kernel, {blocks}, kAttentionThreads, Tile::kSharedBytes, stream, args);
}

// Not for empty tensors: B, H, Sq, Skv and Dv at least 1.
inline void run_attention(const AttentionArgs& args, Stream stream) {
  const AttentionLayout layout(args);
  switch (padded_head(args.d, args.dv)) {
    case 64:
      return launch_attention<64>(args, layout, stream);
    case 128:
      return launch_attention<128>(args, layout, stream);
    default:
      return launch_attention<256>(args, layout, stream);
  }
}

inline void run_pad_values(const Heads& v, DType type, int64_t batch, int64_t heads, int64_t skv, int64_t dv, void* to,
                           DType to_type, int64_t width, Stream stream) {
  launch("attention: pad_values", pad_values_kernel, {static_cast<unsigned>(batch * heads * skv)}, kPrepareThreads, 0,
         stream, v, type, heads, skv, dv, static_cast<uint16_t*>(to), to_type, width);
}

}  // namespace tcompress::cuda
