// The queries of a head against all its keys, in float32, as a template over a path, whose file also has
//
//   void store_sums(float* out, const Vec (&x)[4])     out[i] = sum of the lanes of x[i]
//
// A tile is kRows queries. 1. Scores, four keys at a time: kRows * 4 sums in registers. 2. The softmax of each row.
// 3. P V, four registers of channels at a time. A row in which anything is not finite is done again, with care.
#pragma once

#include <cstdint>

#include "attention_mask.h"
#include "attention_pack.h"
#include "integers.h"
#include "short_attention.h"

namespace tcompress::cpu {
namespace {

constexpr int kKeyTile = 4;

// Tokens of one head as float32, in 16s.
struct FloatTokens {
  const float* data;
  int64_t stride;
  const float* at(int64_t token) const { return data + token * stride; }
};

inline const char* head_start(const TokenView& view, int64_t b, int64_t head, DType dtype) {
  return static_cast<const char*>(view.data) + (b * view.stride_b + head * view.stride_h) * element_bytes(dtype);
}

template <class V>
inline FloatTokens float_tokens(const ShortRows& a, const TokenView& view, int64_t n, float* memory) {
  const ShortArgs& args = *a.args;
  const char* start = head_start(view, a.b, a.kv_head, args.dtype);
  if (args.dtype == DType::kFloat32 && n % 16 == 0 && n > 0)
    return {reinterpret_cast<const float*>(start), view.stride_s};
  for (int64_t t = 0; t < args.skv; ++t)
    load_token<V>(start, args.dtype, t, view.stride_s, n, memory + t * kMaxHeadDim);
  return {memory, kMaxHeadDim};
}

// 2^x for x <= 0, within two units of the last place.
template <class V>
__attribute__((always_inline)) inline V exp2_float(V x) {
  const V y = max(V::set1(-126.f), x);  // a NaN in the second argument survives
  const V n = round_even(y), r = y - n;
  V p = fma(V::set1(0.000153533618f), r, V::set1(0.00133988744f));
  p = fma(p, r, V::set1(0.00961843736f));
  p = fma(p, r, V::set1(0.0555033247f));
  p = fma(p, r, V::set1(0.240226479f));
  p = fma(p, r, V::set1(0.693147203f));
  return fma(p, r, V::set1(1.f)) * exp2_integral(n);
}

template <class V, int kRows>
struct ShortTile {
  const float* q[kRows];
  void* out[kRows];
  int seen[kRows];  // keys
  int most;         // of these
  alignas(64) float p[kRows][kKeyBlock];
  float total[kRows];
};

template <class V, int kRows>
__attribute__((always_inline)) inline void short_scores(ShortTile<V, kRows>& t, const FloatTokens& k, int64_t d) {
  for (int r = 0; r < kRows; ++r) store(t.p[r] + (t.most - 1) / V::kLanes * V::kLanes, V::set1(0.f));
  for (int j = 0; j < t.most; j += kKeyTile) {
    const float* key[kKeyTile];
    for (int c = 0; c < kKeyTile; ++c) key[c] = k.at(j + c < t.most ? j + c : t.most - 1);
    V sum[kRows][kKeyTile];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kKeyTile; ++c) sum[r][c] = V::set1(0.f);
    for (int64_t i = 0; i < d; i += V::kLanes) {
      V x[kKeyTile];
#pragma GCC unroll 4
      for (int c = 0; c < kKeyTile; ++c) x[c] = V::load(key[c] + i);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const V y = V::load(t.q[r] + i);
#pragma GCC unroll 4
        for (int c = 0; c < kKeyTile; ++c) sum[r][c] = fma(y, x[c], sum[r][c]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) store_sums(t.p[r] + j, sum[r]);
  }
}

// Scores to P. Returns zero unless a score of a key up to `most` is not finite.
template <class V, int kRows>
__attribute__((always_inline)) inline V short_softmax(ShortTile<V, kRows>& t, float scale) {
  V odd = V::set1(0.f);
  if (t.most == 1) {
    for (int r = 0; r < kRows; ++r) {
      odd = fma(V::set1(t.p[r][0] * scale), V::set1(0.f), odd);
      t.p[r][0] = t.total[r] = 1.f;
    }
    return odd;
  }
  V highest[kRows], top[kRows], total[kRows];
  const float* edge[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    edge[r] = kEdge.bias + kKeyBlock - t.seen[r];
    highest[r] = V::set1(-__builtin_inff());
    total[r] = V::set1(0.f);
  }
  for (int j = 0; j < t.most; j += V::kLanes) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const V s = V::load(t.p[r] + j) * V::set1(scale);
      odd = fma(s, V::set1(0.f), odd);
      const V seen = s + V::load(edge[r] + j);
      store(t.p[r] + j, seen);
      highest[r] = max(highest[r], seen);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) top[r] = V::set1(reduce_max(highest[r]));
  for (int j = 0; j < t.most; j += V::kLanes) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const V weight = exp2_float(V::load(t.p[r] + j) - top[r]);
      store(t.p[r] + j, weight);
      total[r] = total[r] + weight;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) t.total[r] = reduce_add(total[r]);
  return odd;
}

template <class V, int kVecs, int kRows>
__attribute__((always_inline)) inline V short_values(const ShortTile<V, kRows>& t, const FloatTokens& v, int64_t c,
                                                     float* const (&out)[kRows], V odd) {
  V sum[kRows][kVecs];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) sum[r][i] = V::set1(0.f);
  for (int j = 0; j < t.most; ++j) {
    const float* value = v.at(j) + c;
    V x[kVecs];
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) x[i] = V::load(value + i * V::kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const V weight = V::set1(t.p[r][j]);
#pragma GCC unroll 4
      for (int i = 0; i < kVecs; ++i) sum[r][i] = fma(weight, x[i], sum[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const V factor = V::set1(1.f / t.total[r]);
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) {
      const V x = sum[r][i] * factor;
      odd = fma(x, V::set1(0.f), odd);
      store(out[r] + c + i * V::kLanes, x);
    }
  }
  return odd;
}

// A row that sees no key gives zeros; one that sees a key whose score or value is not finite, NaN; what it does not see
// does not count.
template <class V>
__attribute__((noinline)) void careful_row(const float* q, int seen, const FloatTokens& k, const FloatTokens& v,
                                           const ShortArgs& args, float scale, void* out) {
  float s[kKeyBlock], row[kRowFloats], highest = -__builtin_inff(), total = 0.f, odd = 0.f;
  for (int j = 0; j < seen; ++j) {
    s[j] = 0.f;
    for (int64_t i = 0; i < args.d; ++i) s[j] += q[i] * k.at(j)[i];
    s[j] *= scale;
    odd += s[j] * 0.f;
    for (int64_t i = 0; i < args.dv; ++i) odd += v.at(j)[i] * 0.f;
    if (s[j] > highest) highest = s[j];
  }
  for (int64_t i = 0; i < padded_dv(args.dv); ++i) row[i] = 0.f;
  for (int j = 0; j < seen; ++j) {
    float weight[V::kLanes];
    store(weight, exp2_float(V::set1(s[j] - highest)));
    total += weight[0];
    for (int64_t i = 0; i < args.dv; ++i) row[i] += weight[0] * v.at(j)[i];
  }
  store_row<V>(row, odd != odd ? __builtin_nanf("") : (seen > 0 ? 1.f / total : 0.f), args.dv, args.dtype, out);
}

template <class V, int kRows>
__attribute__((always_inline)) inline void short_tile(const ShortRows& a, int64_t row, const FloatTokens& k,
                                                      const FloatTokens& v) {
  const ShortArgs& args = *a.args;
  const int64_t group = args.heads / args.kv_heads, d = padded(args.d, 16), dv = padded_dv(args.dv);
  const float scale = args.scale * 1.44269504f;  // the softmax is one of powers of 2
  alignas(64) float query[kRows][kRowFloats], result[kRows][kRowFloats];
  const bool in_place = args.dtype == DType::kFloat32 && args.dv % 16 == 0 && args.dv > 0;
  ShortTile<V, kRows> t;
  float* to[kRows];
  int least = kKeyBlock;
  t.most = 0;
  for (int r = 0; r < kRows; ++r) {
    const int64_t head = a.kv_head * group + (row + r) / args.sq, i = (row + r) % args.sq;
    t.q[r] = load_token<V>(head_start(args.q, a.b, head, args.dtype), args.dtype, i, args.q.stride_s, args.d, query[r]);
    t.out[r] = static_cast<char*>(args.out) +
               (a.b * args.out_stride_b + head * args.out_stride_h + i * args.out_stride_s) * element_bytes(args.dtype);
    to[r] = in_place ? static_cast<float*>(t.out[r]) : result[r];
    const int64_t last = args.first + i;
    t.seen[r] = static_cast<int>(last < 0 ? 0 : smaller(last, args.skv));
    t.most = t.seen[r] > t.most ? t.seen[r] : t.most;
    least = t.seen[r] < least ? t.seen[r] : least;
  }
  V odd = V::set1(0.f);
  if (least > 0) {
    short_scores(t, k, d);
    odd = short_softmax(t, scale);
    int64_t c = 0;
    for (; c + 4 * V::kLanes <= dv; c += 4 * V::kLanes) odd = short_values<V, 4>(t, v, c, to, odd);
    for (; c < dv; c += V::kLanes) odd = short_values<V, 1>(t, v, c, to, odd);
  }
  if (least == 0 || reduce_add(odd) != 0.f) {
    for (int r = 0; r < kRows; ++r) careful_row<V>(t.q[r], t.seen[r], k, v, args, scale, t.out[r]);
  } else if (!in_place) {
    for (int r = 0; r < kRows; ++r) store_row<V>(result[r], 1.f, args.dv, args.dtype, t.out[r]);
  }
}

template <class V, int kRows>
void short_rows(const ShortRows& a) {
  const ShortArgs& args = *a.args;
  const FloatTokens k = float_tokens<V>(a, args.k, args.d, a.scratch);
  const FloatTokens v = float_tokens<V>(a, args.v, args.dv, a.scratch + kKeyBlock * kMaxHeadDim);
  int64_t row = a.row0;
  for (; row + kRows <= a.row1; row += kRows) short_tile<V, kRows>(a, row, k, v);
  if constexpr (kRows > 2)
    for (; row + 2 <= a.row1; row += 2) short_tile<V, 2>(a, row, k, v);
  for (; row < a.row1; ++row) short_tile<V, 1>(a, row, k, v);
}

}  // namespace
}  // namespace tcompress::cpu
