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
//     does not see a key; with a softcap, which is no shift of all scores, all steps are, and x c gets back what
//     smoothing took before it is capped.
//  4. `top` follows the running maximum only when it rises by more than 2^8 (P in float16 holds 2^8): the output is
//     multiplied in few steps instead of all.
//  5. O += P V, and the sums of P are one more product, with ones: no additions, no shuffles at the end.
//  6. Divide by the sums; zeros where a query has seen no key.
//
// Constraints (`unsupported` of the op says the same): D and Dv at most 256, bits 8. v: attention_takes_v.
// Heads are padded to 64, 128 or 256. Compute capability 8.0 or above. A value token that is not finite spoils all
// queries of the blocks that touch it, seen or not (0 · NaN). Not measured on a GPU.
//
// Papers: Milakov & Gimelshein, arXiv 1805.02867, section 3; Dao, arXiv 2307.08691, section 3.1; Zhang et al.
// (SageAttention), arXiv 2410.02367, sections 4.2 and 4.3.
#pragma once

#include "attention_warp.cuh"

namespace tcompress::cuda {

template <int kHead, bool kBFloat16, bool kOptions>
__global__ void __launch_bounds__(kAttentionThreads) attention_kernel(const __grid_constant__ AttentionArgs args) {
  using Tile = AttentionTile<kHead>;
  const AttentionLayout layout(args);
  const BlockOfQueries at(args, blockIdx.x, Tile::kQueries);
  const KeySteps steps(args, at.m0, Tile::kQueries, !kOptions);
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
  AttentionWarp<kHead, kBFloat16, kOptions> state{args, threadIdx.x};
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) state.top[i][half] = -INFINITY;
  if (threadIdx.x < Tile::kQueries) {
    ptx::store_shared(q_at + Tile::kScalesAt + threadIdx.x * 4,
                      part<float>(args.workspace, layout.q_scale)[q_row + threadIdx.x]);
    if (kOptions && args.softcap > 0.f)
      ptx::store_shared(q_at + Tile::kShiftsAt + threadIdx.x * 4,
                        part<float>(args.workspace, layout.shift)[q_row + threadIdx.x] * args.scale * kLog2E);
  }
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
    if constexpr (!kOptions) {
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
  const auto kernel = args.mask.data != nullptr || args.softcap > 0.f
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
