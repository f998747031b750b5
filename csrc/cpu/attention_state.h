// What attention_rows.h keeps of a block of queries while the keys pass by, and of a block of keys.
#pragma once

#include <cstdint>

#include "attention.h"
#include "attention_mask.h"
#include "attention_pack.h"
#include "integers.h"

namespace tcompress::cpu {
namespace {

constexpr int kTileSlots = 16;  // rows of a tile, rounded up to any path's vector

// What a block's tokens need beside their integers.
struct BlockScales {
  alignas(64) float k[kKeyBlock];
  alignas(64) int16_t v[kKeyBlock];
  float v_largest;
  bool any_bad;
  bool bad[kKeyBlock];
};

template <class V>
inline void prepare_scales(const float* k_scale, const float* v_scale, int tokens, BlockScales* out) {
  alignas(64) float v[kKeyBlock];
  if (tokens == kKeyBlock) {
    for (int j = 0; j < kKeyBlock; j += V::kLanes) {
      store(out->k + j, V::load(k_scale + j));
      store(v + j, V::load(v_scale + j));
    }
  } else {
    for (int j = 0; j < tokens; ++j) out->k[j] = k_scale[j], v[j] = v_scale[j];
    for (int j = tokens; j < kKeyBlock; ++j) out->k[j] = v[j] = 0.f;
  }
  V finite = V::set1(0.f);
  for (int j = 0; j < kKeyBlock; j += V::kLanes)
    finite = fma(V::load(out->k + j), V::set1(0.f), fma(V::load(v + j), V::set1(0.f), finite));
  out->any_bad = reduce_add(finite) != 0.f;
  if (out->any_bad)
    for (int j = 0; j < kKeyBlock; ++j) {
      out->bad[j] = out->k[j] != out->k[j] || v[j] != v[j];
      if (out->k[j] != out->k[j]) out->k[j] = 0.f;
      if (v[j] != v[j]) v[j] = 0.f;
    }
  V largest = V::set1(0.f);
  for (int j = 0; j < kKeyBlock; j += V::kLanes) largest = max(largest, V::load(v + j));
  out->v_largest = reduce_max(largest);
  const V step = V::set1(out->v_largest > 0.f ? static_cast<float>(kValueOne) / out->v_largest : 0.f);
  for (int j = 0; j < kKeyBlock; j += V::kLanes) store_integers(out->v + j, V::load(v + j) * step);
}

// Scratch memory of one call, and where its parts lie.
template <class Query>
struct RowState {
  int64_t rows, tiles, slots, dk, dv, q_stride;
  Query* q;         // [slots][q_stride]
  float* out;       // [slots][dv], not yet divided
  float* scale;     // [slots] of the queries, in ticks
  float* shift;     // [slots] with softcap: what smoothing the keys took from the query's scores, in ticks
  float* highest;   // [tiles][kTileSlots] running maximum
  float* total;     // [tiles][kTileSlots] sum of P, in units of 2^-13 of the running maximum
  int32_t* sum;     // [slots] of a query's integers
  uint8_t* poison;  // [slots] a visible key or value is not finite
  uint8_t* bad;     // [slots] the query is not finite
  QueryRow* row;    // [slots]

  RowState(const AttentionRows& a, uint8_t* memory)
      : rows(a.row1 - a.row0),
        tiles(ceil_div(a.row1 - a.row0, kQueryTile)),
        slots(tiles * kQueryTile),
        dk(padded_d(a.args->d)),
        dv(padded_dv(a.args->dv)),
        q_stride(padded(a.args->d, 16)) {
    const auto take = [&](int64_t bytes) {
      uint8_t* part = memory;
      memory += line_up(bytes);
      return part;
    };
    q = reinterpret_cast<Query*>(take(slots * q_stride * sizeof(Query)));
    out = reinterpret_cast<float*>(take(slots * dv * 4));
    scale = reinterpret_cast<float*>(take(slots * 4));
    shift = reinterpret_cast<float*>(take(slots * 4));
    highest = reinterpret_cast<float*>(take(tiles * kTileSlots * 4));
    total = reinterpret_cast<float*>(take(tiles * kTileSlots * 4));
    sum = reinterpret_cast<int32_t*>(take(slots * 4));
    poison = take(slots);
    bad = take(slots);
    row = reinterpret_cast<QueryRow*>(take(slots * sizeof(QueryRow)));
  }

  static int64_t slot(int64_t r) { return r / kQueryTile * kTileSlots + r % kQueryTile; }
};

// The query's address, and its place in the mask; row = g * sq + i.
struct Place {
  int64_t head, i;
};
inline Place place_of(const AttentionRows& a, int64_t row) {
  const int64_t group = a.args->heads / a.args->kv_heads;
  return {a.kv_head * group + row / a.sq, row % a.sq};
}
inline int64_t offset_of(const AttentionRows& a) { return a.args->window.bottom_right ? a.head.length - a.sq : 0; }

// q . k_mean, in the order of the channels.
inline float mean_product(const AttentionRows& a, const float* q) {
  float sum = 0.f;
  for (int64_t i = 0; i < a.args->d; ++i) sum += q[i] * a.head.k_mean[i];
  return sum;
}

template <class V, class T, class Query>
inline void quantize_queries(const AttentionRows& a, RowState<Query>* state) {
  const AttentionArgs& args = *a.args;
  alignas(64) float buffer[kRowFloats];
  const int q_max = largest_integer(args.bits);
  for (int64_t r = 0; r < state->slots; ++r) {
    Query* q = state->q + r * state->q_stride;
    state->scale[r] = state->shift[r] = 0.f;
    state->poison[r] = state->bad[r] = 0;
    state->sum[r] = 0;
    if (r >= state->rows) {
      for (int64_t i = 0; i < state->q_stride; ++i) q[i] = 0;
      continue;
    }
    const Place place = place_of(a, a.row0 + r);
    state->row[r] = {place.i + offset_of(a),
                     a.b * args.mask.stride_b + place.head * args.mask.stride_h + place.i * args.mask.stride_i};
    const int64_t start = a.b * args.q.stride_b + place.head * args.q.stride_h;
    const float* x = load_token<V>(static_cast<const char*>(args.q.data) + start * element_bytes(args.dtype),
                                   args.dtype, a.q_begin + place.i, args.q.stride_s, args.d, buffer);
    const float scale = quantize_token<V>(x, nullptr, state->q_stride, q_max, args.scale < 0.f ? -1.f : 1.f, q);
    state->bad[r] = scale != scale;
    if (scale == scale) {
      state->scale[r] = scale * args.scale_ticks;
      // The cap is no shift of all scores: it needs them whole.
      if (args.softcap != 0.f)
        state->shift[r] = mean_product(a, x) * (args.scale < 0.f ? -args.scale_ticks : args.scale_ticks);
    }
    state->sum[r] = T::sum_of(q, state->q_stride);
  }
  for (int64_t i = 0; i < state->tiles * kTileSlots; ++i) state->highest[i] = -__builtin_inff(), state->total[i] = 0.f;
  for (int64_t i = 0; i < state->slots * state->dv; ++i) state->out[i] = 0.f;
}

}  // namespace
}  // namespace tcompress::cpu
