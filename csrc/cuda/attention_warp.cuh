// What a warp of attention.cuh does with a block of keys: steps 2 to 6 there.
#pragma once

#include "attention_tile.cuh"

namespace tcompress::cuda {

constexpr int kKeyTiles = kKeyBlock / 8;  // mma tiles of a step's keys
constexpr float kBias = 12582912.f;       // 1.5 · 2^23
constexpr int32_t kBiasBits = 0x4B400000;
constexpr float kRise = 8.f;             // of `top`, in exponents of 2
constexpr float kLowestMask = -1.0e38f;  // a finite entry of a mask does not hide its key
constexpr float kLn2 = 0.6931471805599453f;

// kOptions: there is a mask tensor or a softcap.
template <int kHead, bool kBFloat16, bool kOptions>
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
  // Of a number for each query, in shared memory from `begin` on.
  __device__ __forceinline__ static float load_row(int begin, int i, int half, unsigned thread) {
    return ptx::load_shared<float>(ptx::shared_base() + begin + (row_of(thread) + i * 16 + half * 8) * 4);
  }
  __device__ __forceinline__ static float load_scale(int i, int half, unsigned thread) {
    return load_row(Tile::kScalesAt, i, half, thread);
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

  // softcap · tanh(s / softcap) of a score in exponents of 2: tanh x = 1 - 2 / (1 + e^2x), off by 2^-22 of the softcap.
  __device__ __forceinline__ float softcapped(float s) const {
    const float cap = args.softcap * kLog2E, e = ptx::exp2_approximate(s * (2.f / args.softcap));
    return ptx::fused_multiply_add(-2.f * cap, ptx::reciprocal_approximate(1.f + e), cap);
  }

  // Scores in place of x: scaled, and capped, as the bits of floats.
  __device__ __forceinline__ void scale_scores(int32_t (&x)[kRowTiles][kKeyTiles][4], float k_scale, unsigned thread) {
    const bool has_cap = kOptions && args.softcap > 0.f;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float c = q_scale(i, half, thread) * k_scale;
        const auto score = [&](int j, int e) {
          return (ptx::from_bits(static_cast<uint32_t>(x[i][j][half * 2 + e])) - kBias) * c;
        };
        const auto keep = [&](int j, int e, float s) { x[i][j][half * 2 + e] = static_cast<int32_t>(ptx::to_bits(s)); };
        if (has_cap) {
          const float shift = load_row(Tile::kShiftsAt, i, half, thread);
#pragma unroll
          for (int j = 0; j < kKeyTiles; ++j) {
            keep(j, 0, softcapped(score(j, 0) + shift));
            keep(j, 1, softcapped(score(j, 1) + shift));
          }
        } else {
#pragma unroll
          for (int j = 0; j < kKeyTiles; ++j) {
            keep(j, 0, score(j, 0));
            keep(j, 1, score(j, 1));
          }
        }
      }
  }

  // -inf in place of the scores of keys that are not seen; a float mask added to the others.
  __device__ __forceinline__ void mask_scores(int32_t (&x)[kRowTiles][kKeyTiles][4], int first_key, unsigned thread) {
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
        // the keys that it sees, counted from this lane's first
        int end = right >= 0 ? position + right + 1 : keys;
        if (TC_PLANTED(kWrongMask)) ++end;
        const int high = (end < keys ? end : keys) - column;
        const int low = left >= 0 ? position - left - column : -column;
        const int64_t entry = at.b * args.mask.stride_b + at.h * args.mask.stride_h + m * args.mask.stride_m +
                              static_cast<int64_t>(first_key + column) * args.mask.stride_n;
        const bool has_mask = kOptions && args.mask.data != nullptr && m < args.sq;
#pragma unroll
        for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int key = j * 8 + e;
            bool seen = key >= low && key < high;
            float s = ptx::from_bits(static_cast<uint32_t>(x[i][j][half * 2 + e]));
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
    if (kMasked) {
      scale_scores(x, k_scale, thread);
      mask_scores(x, block * kKeyBlock, thread);
    }
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

  // q · mean of K, which smoothing K took from the scores.
  __device__ __forceinline__ float shift_of(int64_t bh, int64_t m) const {
    const AttentionLayout layout(args);
    return part<float>(args.workspace, layout.shift)[bh * layout.sqp + m];
  }

  // 6.
  __device__ __forceinline__ void store() {
    // computed anew, so that it need not live in registers through the loops
    const BlockOfQueries block(args, ptx::block_anew(), Tile::kQueries);
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
          const float shift = args.softcap > 0.f ? 0.f : args.scale * shift_of(block.bh, m);
          args.lse[block.bh * args.sq + m] =
              empty ? -INFINITY : (top[i][half] + ptx::log2_approximate(total)) * kLn2 + shift;
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

}  // namespace tcompress::cuda
