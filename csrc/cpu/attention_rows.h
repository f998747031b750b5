// A block of queries against the keys of a head, as a template over a path. The path's file has, beside what
// attention_softmax.h and attention_pack.h ask for:
//
//   Vec from_integers(const int32_t*)                    before this header
//   template <bool kWide> struct Tiles {
//     using Query;                                       int8_t or int16_t: how the integers of a query are held
//     static int32_t sum_of(const Query* q, int64_t n);  of a query's integers, if scores wants it, else 0
//     static void scores(const Query* q, int64_t stride, const int32_t* sums, int rows, const void* keys, int64_t dk,
//                        int panels, int32_t* s);        s [rows][64] = Q K^T; sums[r] = sum of q's integers
//     static void store_weights(const Shorts (&p)[…], void* row);     a row of P', kWeightBytes
//     static void values(const void* weights, int rows, const void* values, int token_panels, int64_t dv,
//                        const float* factor, float* out);            out [rows][dv] += float(P' V) * factor[row]
//   };
//
// 1. The queries are quantized, in tiles of six rows.
// 2. For each block of keys, while it is in the nearest caches, every tile: scores, softmax, P V. A few tiles go
// through
//    each of these together, so that what one wrote element by element has reached the cache when it is read as a
//    vector. Blocks that no query of the tile sees are skipped. Blocks that all see whole, without mask or softcap,
//    take a loop without any of that.
// 3. Each row is divided by its total, or left unfinished where the keys are split over threads.
#pragma once

#include <cstdint>

#include "attention.h"
#include "attention_mask.h"
#include "attention_pack.h"
#include "attention_softmax.h"
#include "attention_state.h"
#include "integers.h"

namespace tcompress::cpu {
namespace {

template <class V>
using Scores = V[kKeyBlock / V::kLanes];

template <class V>
__attribute__((always_inline)) inline void load_scores(const int32_t* products, const float* k_scale, Scores<V>& s) {
#pragma GCC unroll 64
  for (int i = 0; i < kKeyBlock / V::kLanes; ++i)
    s[i] = from_integers(products + i * V::kLanes) * V::load(k_scale + i * V::kLanes);
}

template <class V>
__attribute__((always_inline)) inline float highest_of(const Scores<V>& s) {
  constexpr int kVecs = kKeyBlock / V::kLanes;
  constexpr int kChains = kVecs < 4 ? kVecs : 4;
  V m[kChains];
#pragma GCC unroll 4
  for (int i = 0; i < kChains; ++i) m[i] = s[i];
#pragma GCC unroll 64
  for (int i = kChains; i < kVecs; ++i) m[i % kChains] = max(m[i % kChains], s[i]);
#pragma GCC unroll 4
  for (int i = 1; i < kChains; ++i) m[0] = max(m[0], m[i]);
  return reduce_max(m[0]);
}

// One tile against one block.
struct TileBlock {
  const AttentionArgs& args;
  const BlockScales& scales;
  KeySpan span;
  const QueryRow* row;
  int rows;
  const float *q_scale, *shift;
  uint8_t* poison;
  const int32_t* products;  // [rows][64]
  uint8_t* weights;         // [rows][kWeightBytes]
  float* highest;           // [rows]
  float* total;             // [rows]
};

template <class V, class H, class T>
inline void finish_row(const TileBlock& t, int r, const Scores<V>& s, float highest) {
  constexpr int kShorts = kKeyBlock / V::kLanes / H::kVecs;
  H p[kShorts];
  t.highest[r] = highest;
  t.total[r] = static_cast<float>(weights(s, highest, p));
#pragma GCC unroll 64
  for (int i = 0; i < kShorts; ++i) p[i] = mul_high(p[i], H::load(t.scales.v + i * H::kLanes));
  T::store_weights(p, t.weights + r * kWeightBytes);
}

// All queries see all 64 keys, without mask or softcap.
template <class V, class H, class T>
inline void softmax_whole(const TileBlock& t) {
  for (int r = 0; r < t.rows; ++r) {
    Scores<V> s;
    load_scores<V>(t.products + r * kKeyBlock, t.scales.k, s);
    const V q_scale = V::set1(t.q_scale[r]);
#pragma GCC unroll 64
    for (int i = 0; i < kKeyBlock / V::kLanes; ++i) s[i] = s[i] * q_scale;
    finish_row<V, H, T>(t, r, s, highest_of<V>(s));
  }
}

template <class V, class H, class T>
inline void softmax_masked(const TileBlock& t) {
  constexpr int kVecs = kKeyBlock / V::kLanes;
  for (int r = 0; r < t.rows; ++r) {
    Scores<V> s;
    load_scores<V>(t.products + r * kKeyBlock, t.scales.k, s);
    const V q_scale = V::set1(t.q_scale[r]), shift = V::set1(t.shift[r]);
    V finite = shift * V::set1(0.f);
#pragma GCC unroll 64
    for (int i = 0; i < kVecs; ++i) {
      s[i] = s[i] * q_scale;
      finite = fma(s[i], V::set1(0.f), finite);
    }
    if (t.args.softcap != 0.f)
      for (int i = 0; i < kVecs; ++i) s[i] = soften(s[i] + shift, t.args.softcap_ticks, t.args.softcap_factor);

    const KeyRange range = visible_range(t.args.window, t.row[r].position, t.span);
    alignas(64) float built[kKeyBlock];
    const float* bias = kEdge.bias + kKeyBlock - range.last;
    bool odd = t.scales.any_bad || reduce_add(finite) != 0.f;
    if (t.args.mask.data != nullptr || range.first > 0 || t.scales.any_bad) {
      odd |= build_bias<V>(t.args.mask, t.row[r], t.span, range, built);
      bias = built;
    }
#pragma GCC unroll 64
    for (int i = 0; i < kVecs; ++i) s[i] = s[i] + V::load(bias + i * V::kLanes);
    if (odd) {  // something is not finite: does the query see it?
      alignas(64) float values[kKeyBlock];
      for (int i = 0; i < kVecs; ++i) store(values + i * V::kLanes, s[i]);
      for (int j = 0; j < kKeyBlock; ++j) {
        const bool hidden = bias[j] == -__builtin_inff();
        const bool broken = (t.scales.any_bad && t.scales.bad[j]) || values[j] != values[j];
        if (!hidden && broken) t.poison[r] = 1;
        if (hidden || broken) values[j] = -__builtin_inff();
      }
      for (int i = 0; i < kVecs; ++i) s[i] = V::load(values + i * V::kLanes);
    }
    finish_row<V, H, T>(t, r, s, highest_of<V>(s));
  }
}

// Takes a block's maxima and totals into the running ones; factor[r] is what the block's sums are multiplied by.
template <class V, class Query>
inline void rescale(RowState<Query>* state, int64_t first, int rows, const float* block_highest,
                    const float* block_total, float v_largest, float* factor) {
  alignas(64) float keep[kTileSlots];
  float* highest = state->highest + RowState<Query>::slot(first);
  float* total = state->total + RowState<Query>::slot(first);
  for (int r = 0; r < rows; r += V::kLanes) {
    const V before = V::load(highest + r), now = V::load(block_highest + r);
    const V both = max(before, now), floor = max(both, V::set1(kLowest));
    const V share = exp2_exact(now - floor), kept = exp2_exact(before - floor);
    store(total + r, V::load(total + r) * kept + share * V::load(block_total + r));
    store(highest + r, both);
    store(keep + r, kept);
    store(factor + r, share * V::set1(v_largest));
  }
  for (int r = 0; r < rows; ++r) {
    if (keep[r] == 1.f) continue;
    float* out = state->out + (first + r) * state->dv;
    const V kept = V::set1(keep[r]);
    for (int64_t i = 0; i < state->dv; i += V::kLanes) store(out + i, V::load(out + i) * kept);
  }
}

template <class V, class T>
inline void store_row_typed(const float* row, float factor, int64_t n, T* out) {
  const V f = V::set1(factor);
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) store(out + i, V::load(row + i) * f);
  if (i == n) return;
  T tail[V::kLanes];
  store(tail, V::load(row + i) * f);
  for (int64_t e = i; e < n; ++e) out[e] = tail[e - i];
}

template <class V>
inline void store_row(const float* row, float factor, int64_t n, DType dtype, void* out) {
  if (dtype == DType::kFloat32) return store_row_typed<V>(row, factor, n, static_cast<float*>(out));
  if (dtype == DType::kBFloat16) return store_row_typed<V>(row, factor, n, static_cast<BFloat16*>(out));
  return store_row_typed<V>(row, factor, n, static_cast<Float16*>(out));
}

// scale * q . k_mean: what smoothing the keys took from every score.
template <class V>
inline float mean_score(const AttentionRows& a, const Place& place) {
  const AttentionArgs& args = *a.args;
  alignas(64) float buffer[kRowFloats];
  const int64_t start = a.b * args.q.stride_b + place.head * args.q.stride_h;
  const float* x = load_token<V>(static_cast<const char*>(args.q.data) + start * element_bytes(args.dtype), args.dtype,
                                 a.q_begin + place.i, args.q.stride_s, args.d, buffer);
  return mean_product(a, x) * args.scale;
}

struct RowResult {
  const float* out;
  float highest, total;
  bool poison, bad;
};

template <class V>
inline void write_row(const AttentionRows& a, int64_t row, const RowResult& result) {
  const AttentionArgs& args = *a.args;
  const Place place = place_of(a, row);
  const bool empty = result.highest == -__builtin_inff();
  float factor = empty ? 0.f : 1.f / result.total;
  if (result.poison || (result.bad && !empty)) factor = __builtin_nanf("");
  // P' counts a value by kValueOne + 1 units, of which its weight had kValueOne
  const float unit = static_cast<float>(static_cast<double>(kValueOne + 1) / kValueOne);
  const int64_t start =
      a.b * args.out_stride_b + place.head * args.out_stride_h + (a.q_begin + place.i) * args.out_stride_s;
  store_row<V>(result.out, factor * unit, args.dv, args.dtype,
               static_cast<char*>(args.out) + start * element_bytes(args.dtype));
  if (args.lse == nullptr) return;
  float lse = -__builtin_inff();
  if (!empty)
    lse = result.highest / kTicksPerNat + __builtin_logf(result.total / kWeightOne) +
          (args.softcap == 0.f ? mean_score<V>(a, place) : 0.f);
  args.lse[a.b * args.lse_stride_b + place.head * args.lse_stride_h + a.q_begin + place.i] =
      factor == factor ? lse : factor;
}

constexpr int kTileBatch = 4;

// A tile on its way through a block of keys.
struct TileWork {
  alignas(64) int32_t products[kQueryTile * kKeyBlock];  // of keys that none sees: anything
  alignas(64) uint8_t weights[kQueryTile * kWeightBytes];
  alignas(64) float highest[kTileSlots], total[kTileSlots], factor[kTileSlots];
  int64_t first;  // row
  int rows, panels;
  bool whole;
};

// What a tile has to do with a block; false: nothing.
inline bool plan_tile(const AttentionRows& a, const QueryRow* row, const KeySpan& span, TileWork* tile) {
  const AttentionArgs& args = *a.args;
  // Positions rise within a head; a tile that spans two heads may hold any.
  const bool one_head = row[tile->rows - 1].position - row[0].position == tile->rows - 1;
  const int64_t lowest = one_head ? row[0].position : offset_of(a);
  const int64_t last = one_head ? row[tile->rows - 1].position : offset_of(a) + a.sq - 1;
  Sight sight = sight_by_position(args.window, lowest, last, span);
  if (sight == Sight::kNone) return false;
  if (args.mask.data != nullptr) {
    Sight by_mask = sight_by_mask(args.mask, row[0], span);
    for (int r = 1; r < tile->rows && by_mask != Sight::kSome; ++r)
      if (row[r].mask != row[0].mask) by_mask = join(by_mask, sight_by_mask(args.mask, row[r], span));
    if (by_mask == Sight::kNone) return false;
    if (by_mask == Sight::kSome) sight = by_mask;
  }
  int64_t seen = span.tokens;  // keys beyond cannot be seen by any row
  if (args.window.right >= 0) seen = smaller(seen, last + args.window.right + 1 - span.j0);
  tile->panels = static_cast<int>(ceil_div(seen, kTokenPanel));
  tile->whole = sight == Sight::kAll && span.tokens == kKeyBlock && args.softcap == 0.f;
  return true;
}

template <class V, class H, class T, bool kWide>
void attend(const AttentionRows& a) {
  using Query = typename T::Query;
  const AttentionArgs& args = *a.args;
  RowState<Query> state(a, a.scratch);
  quantize_queries<V, T>(a, &state);

  TileWork tiles[kTileBatch];
  BlockScales scales;
  const int64_t k_bytes = key_block_bytes(args.d, kWide), v_bytes = value_block_bytes(args.dv, kWide);
  for (int64_t block = a.block0; block < a.block1; ++block) {
    const KeySpan span{block * kKeyBlock, static_cast<int>(smaller(kKeyBlock, a.head.length - block * kKeyBlock))};
    const char* keys = static_cast<const char*>(a.head.k) + block * k_bytes;
    const char* values = static_cast<const char*>(a.head.v) + block * v_bytes;
    bool prepared = false;
    for (int64_t row = 0; row < state.rows;) {
      int n = 0;
      for (; n < kTileBatch && row < state.rows; row += kQueryTile) {
        tiles[n].first = row;
        tiles[n].rows = static_cast<int>(smaller(state.rows - row, kQueryTile));
        if (plan_tile(a, state.row + row, span, &tiles[n])) ++n;
      }
      if (n == 0) continue;
      if (!prepared) prepare_scales<V>(a.head.k_scale + span.j0, a.head.v_scale + span.j0, span.tokens, &scales);
      prepared = true;
      for (int i = 0; i < n; ++i) {
        TileWork& t = tiles[i];
        T::scores(state.q + t.first * state.q_stride, state.q_stride, state.sum + t.first, t.rows, keys, state.dk,
                  t.panels, t.products);
      }
      for (int i = 0; i < n; ++i) {
        TileWork& t = tiles[i];
        const TileBlock block_of{args,
                                 scales,
                                 span,
                                 state.row + t.first,
                                 t.rows,
                                 state.scale + t.first,
                                 state.shift + t.first,
                                 state.poison + t.first,
                                 t.products,
                                 t.weights,
                                 t.highest,
                                 t.total};
        if (t.whole && !scales.any_bad) {
          softmax_whole<V, H, T>(block_of);
        } else {
          softmax_masked<V, H, T>(block_of);
        }
      }
      for (int i = 0; i < n; ++i) {
        TileWork& t = tiles[i];
        rescale<V>(&state, t.first, t.rows, t.highest, t.total, scales.v_largest, t.factor);
        T::values(t.weights, t.rows, values, t.panels, state.dv, t.factor, state.out + t.first * state.dv);
      }
    }
  }

  for (int64_t r = 0; r < state.rows; ++r) {
    const float* out = state.out + r * state.dv;
    if (a.partial == nullptr) {
      write_row<V>(
          a, a.row0 + r,
          {out, state.highest[state.slot(r)], state.total[state.slot(r)], state.poison[r] != 0, state.bad[r] != 0});
      continue;
    }
    float* end = a.partial + state.rows * state.dv;
    for (int64_t i = 0; i < state.dv; ++i) a.partial[r * state.dv + i] = out[i];
    end[r] = state.highest[state.slot(r)];
    end[state.rows + r] = state.total[state.slot(r)];
    end[2 * state.rows + r] = static_cast<float>(state.poison[r] + 2 * state.bad[r]);
  }
}

// Joins the partial results of one block of queries, `stride` floats apart.
template <class V>
void combine(const AttentionRows& a, int64_t splits, int64_t stride) {
  const int64_t rows = a.row1 - a.row0, dv = padded_dv(a.args->dv);
  alignas(64) float out[kRowFloats];
  for (int64_t r = 0; r < rows; ++r) {
    float highest = -__builtin_inff(), total = 0.f;
    int flags = 0;
    const auto of = [&](int64_t split, int64_t array) {
      return a.partial[split * stride + rows * dv + array * rows + r];
    };
    for (int64_t s = 0; s < splits; ++s) {
      if (!(of(s, 0) <= highest)) highest = of(s, 0);
      flags |= static_cast<int>(of(s, 2));
    }
    const float floor = highest > kLowest ? highest : kLowest;
    for (int64_t i = 0; i < dv; ++i) out[i] = 0.f;
    for (int64_t s = 0; s < splits; ++s) {
      float share[V::kLanes];
      store(share, exp2_exact(V::set1(of(s, 0) - floor)));
      total += of(s, 1) * share[0];
      for (int64_t i = 0; i < dv; ++i) out[i] += a.partial[s * stride + r * dv + i] * share[0];
    }
    write_row<V>(a, a.row0 + r, {out, highest, total, (flags & 1) != 0, (flags & 2) != 0});
  }
}

}  // namespace
}  // namespace tcompress::cpu
