// One token to 8-bit (or fewer) integers, as a template over the vector class of a path (vec_*.h).
//
//   symmetric, qmax = 2^(bits-1) - 1:   scale = max|x| / qmax
//                                       q = clamp(round(x / scale), -qmax, qmax)
//   asymmetric, qmax = 2^bits - 1:      scale = (max(x,0) - min(x,0)) / qmax
//                                       zero_point = round(-min(x,0) / scale)
//                                       q = clamp(round(x / scale) + zero_point, 0, qmax)
//
// Rounding is half to even. Division is written as multiplication by a float32 reciprocal, the same in the reference,
// so that all paths and devices agree bit for bit. The range of a row is at least kMinRange: an all-zero row needs no
// special case and the reciprocal stays finite. A row that holds NaN or infinity gets scale NaN and zeros for the rest.
//
// With a fixed scale and zero point only the last line is left. What lies outside of the range is clamped before it is
// rounded: a conversion to int32 must not overflow, and the limits are integers, so that the result is the same.
#pragma once

#include <cstdint>

#include "quantize_per_token.h"
#include "rounding.h"

namespace tcompress::cpu {
namespace {

constexpr float kMinRange = 0x1p-100f;

template <class V, class T, bool kFixed>
inline void quantize_row_typed(const QuantizeRowArgs& args) {
  constexpr int kLanes = V::kLanes;
  const T* x = static_cast<const T*>(args.x);
  const int64_t k = args.k, body = k - k % kLanes;
  T tail[kLanes] = {};  // zeros change neither the range, which includes 0, nor the finiteness
  for (int64_t i = body; i < k; ++i) tail[i - body] = x[i];

  // Four of each, because the next minimum must wait four cycles for the last one.
  constexpr int kUnroll = 4;
  V lo[kUnroll], hi[kUnroll], finite[kUnroll];
  for (int j = 0; j < kUnroll; ++j) lo[j] = hi[j] = finite[j] = V::set1(0.f);
  const auto collect = [&](const T* p, int j) {
    const V v = V::load(p);
    if constexpr (!kFixed) {
      lo[j] = min(lo[j], v);
      hi[j] = max(hi[j], v);
    }
    finite[j] = fma(v, V::set1(0.f), finite[j]);  // inf*0 and NaN*0 are NaN, and stay
  };
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= body; i += kUnroll * kLanes)
    for (int j = 0; j < kUnroll; ++j) collect(x + i + j * kLanes, j);
  for (; i < body; i += kLanes) collect(x + i, 0);
  if (body < k) collect(tail, 0);
  for (int j = 1; j < kUnroll; ++j) {
    lo[0] = min(lo[0], lo[j]);
    hi[0] = max(hi[0], hi[j]);
    finite[0] = finite[0] + finite[j];
  }

  uint8_t* q = args.q;
  for (i = k; i < args.k_padded; ++i) q[i] = 0;
  const bool usable = !kFixed || (args.fixed->scale > 0.f && args.fixed->scale * 0.f == 0.f &&
                                  1.f / args.fixed->scale * 0.f == 0.f);  // infinity times 0 is NaN
  if (!usable || reduce_add(finite[0]) != 0.f) {                          // NaN
    *args.scale = __builtin_nanf("");
    *args.zero_point = 0;
    for (i = 0; i < k; ++i) q[i] = args.flip;
    return;
  }
  const float x_min = reduce_min(lo[0]), x_max = reduce_max(hi[0]);
  const int32_t q_max = args.symmetric ? (1 << (args.bits - 1)) - 1 : (1 << args.bits) - 1;
  const int32_t q_min = args.symmetric ? -q_max : 0;
  const float step = 1.f / static_cast<float>(q_max);
  // In the asymmetric case each term is scaled before they are joined: x_max - x_min may exceed the largest float.
  const float amax = -x_min > x_max ? -x_min : x_max;
  const float wanted = args.symmetric ? amax * step : x_max * step - x_min * step;
  const float scale = kFixed ? args.fixed->scale : wanted > kMinRange * step ? wanted : kMinRange * step;
  const float inverse = 1.f / scale;
  const int32_t zero_point = kFixed           ? args.fixed->zero_point
                             : args.symmetric ? 0
                                              : static_cast<int32_t>(round_half_even(-x_min * inverse));
  *args.scale = scale;
  *args.zero_point = zero_point;

  const V factor = V::set1(inverse);
  const V least = V::set1(static_cast<float>(q_min - zero_point));
  const V most = V::set1(static_cast<float>(q_max - zero_point));
  const auto scaled = [&](const T* p) {
    const V v = V::load(p) * factor;
    return kFixed ? min(max(v, least), most) : v;
  };
  for (i = 0; i < body; i += kLanes) store_quantized(q + i, scaled(x + i), zero_point, q_min, q_max, args.flip);
  if (body < k) {
    uint8_t tail_q[kLanes];
    store_quantized(tail_q, scaled(tail), zero_point, q_min, q_max, args.flip);
    for (i = body; i < k; ++i) q[i] = tail_q[i - body];
  }
}

template <class V, class T>
inline void quantize_row_of(const QuantizeRowArgs& args) {
  return args.fixed ? quantize_row_typed<V, T, true>(args) : quantize_row_typed<V, T, false>(args);
}

template <class V>
inline void quantize_row(const QuantizeRowArgs& args) {
  switch (args.dtype) {
    case DType::kFloat32:
      return quantize_row_of<V, float>(args);
    case DType::kBFloat16:
      return quantize_row_of<V, BFloat16>(args);
    case DType::kFloat16:
      return quantize_row_of<V, Float16>(args);
    case DType::kInt32:
      return;  // not an input type; the binding refuses it
  }
}

}  // namespace
}  // namespace tcompress::cpu
