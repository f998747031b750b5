// From sums to the output's type, as templates over the vector class of a path (vec_*.h):
//
//   integers:  y[n] = activation(float(acc[n] - zero_point * column_sum[n]) * scale * weight_scale[n] + bias[n])
//                     * factor[n] + residual[n]
//   floats:    y[n] = activation(acc[n] * scale + bias[n]) * factor[n] + residual[n]
//
// factor and residual have the output's type, and may be the output itself.
// Each multiplication and addition rounds once, in this order, in the reference too.
#pragma once

#include "activation.h"
#include "int4_linear.h"
#include "int8_linear.h"

namespace tcompress::cpu {
namespace {

// What is applied to a row of sums; the same for all kernels.
template <class Out>
struct RowEnd {
  const float* bias;    // or null
  const Out* factor;    // or null
  const Out* residual;  // or null
  Out* y;
};

template <class T>
inline const T* from(const T* p, int64_t i) {
  return p == nullptr ? nullptr : p + i;
}

template <class V, Activation kActivation, class Out>
inline void finish(V v, const RowEnd<Out>& end) {
  if (end.bias != nullptr) v = v + V::load(end.bias);
  v = activate<kActivation>(v);
  if (end.factor != nullptr) v = v * V::load(end.factor);
  if (end.residual != nullptr) v = v + V::load(end.residual);
  store(end.y, v);
}

// value(i, weight_scale) gives the columns from i on. What it reads of the kernel's own memory is padded to a whole
// panel; the caller's arrays are not, so their tails are copied.
template <class V, Activation kActivation, class Out, class Value>
inline void finish_row(int64_t n, const float* weight_scale, const RowEnd<Out>& end, const Value& value) {
  constexpr int kLanes = V::kLanes;
  const int64_t body = n - n % kLanes;
  for (int64_t i = 0; i < body; i += kLanes)
    finish<V, kActivation, Out>(value(i, from(weight_scale, i)),
                                {from(end.bias, i), from(end.factor, i), from(end.residual, i), end.y + i});
  if (body == n) return;
  float scale[kLanes] = {}, bias[kLanes] = {};
  Out factor[kLanes] = {}, residual[kLanes] = {}, y[kLanes];
  for (int64_t i = body; i < n; ++i) {
    if (weight_scale != nullptr) scale[i - body] = weight_scale[i];
    if (end.bias != nullptr) bias[i - body] = end.bias[i];
    if (end.factor != nullptr) factor[i - body] = end.factor[i];
    if (end.residual != nullptr) residual[i - body] = end.residual[i];
  }
  finish<V, kActivation, Out>(value(body, scale),
                              {end.bias == nullptr ? nullptr : bias, end.factor == nullptr ? nullptr : factor,
                               end.residual == nullptr ? nullptr : residual, y});
  for (int64_t i = body; i < n; ++i) end.y[i] = y[i - body];
}

template <class Out, class Args>
inline RowEnd<Out> row_end(const Args& args, int64_t row) {
  const int64_t at = row * args.y_stride;
  return {args.bias, from(static_cast<const Out*>(args.factor), at), from(static_cast<const Out*>(args.residual), at),
          static_cast<Out*>(args.y) + at};
}

template <class V, Activation kActivation, class Out>
void epilogue_rows(const EpilogueArgs& args) {
  for (int64_t r = 0; r < args.rows; ++r) {
    const V scale = V::set1(args.scale[r]);
    const int32_t zero_point = args.zero_point[r];
    const int32_t* acc = args.acc + r * args.acc_stride;
    finish_row<V, kActivation, Out>(
        args.n, args.weight_scale, row_end<Out>(args, r), [&](int64_t i, const float* weight_scale) {
          return V::from_difference(acc + i, zero_point, args.column_sum + i) * scale * V::load(weight_scale);
        });
  }
}

template <class V>
void epilogue_rows_integers(const EpilogueArgs& args) {
  for (int64_t r = 0; r < args.rows; ++r) {
    int32_t* acc = args.acc + r * args.acc_stride;
    int32_t* y = static_cast<int32_t*>(args.y) + r * args.y_stride;
    for (int64_t i = 0; i < args.n; i += V::kLanes)
      V::subtract_product(acc + i, args.zero_point[r], args.column_sum + i);
    for (int64_t i = 0; i < args.n; ++i) y[i] = acc[i];
  }
}

template <class V, Activation kActivation, class Out>
void float_epilogue_rows(const FloatEpilogueArgs& args) {
  for (int64_t r = 0; r < args.rows; ++r) {
    const V scale = V::set1(args.scale[r]);
    const float* acc = args.acc + r * args.acc_stride;
    finish_row<V, kActivation, Out>(args.n, nullptr, row_end<Out>(args, r),
                                    [&](int64_t i, const float*) { return V::load(acc + i) * scale; });
  }
}

using Epilogue = void (*)(const EpilogueArgs&);
using FloatEpilogue = void (*)(const FloatEpilogueArgs&);

template <class V, Activation kActivation>
Epilogue epilogue_for_dtype(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return epilogue_rows<V, kActivation, float>;
    case DType::kBFloat16:
      return epilogue_rows<V, kActivation, BFloat16>;
    case DType::kFloat16:
      return epilogue_rows<V, kActivation, Float16>;
    case DType::kInt32:
      return epilogue_rows_integers<V>;
  }
  return nullptr;
}

template <class V, Activation kActivation>
FloatEpilogue float_epilogue_for_dtype(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return float_epilogue_rows<V, kActivation, float>;
    case DType::kBFloat16:
      return float_epilogue_rows<V, kActivation, BFloat16>;
    case DType::kFloat16:
      return float_epilogue_rows<V, kActivation, Float16>;
    case DType::kInt32:
      break;  // the binding refuses it
  }
  return nullptr;
}

// Calls f with the activation as a compile-time constant.
template <class F>
auto with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kRelu:
      return f(ActivationConstant<Activation::kRelu>{});
    case Activation::kGelu:
      return f(ActivationConstant<Activation::kGelu>{});
    case Activation::kGeluTanh:
      return f(ActivationConstant<Activation::kGeluTanh>{});
    case Activation::kSilu:
      return f(ActivationConstant<Activation::kSilu>{});
    case Activation::kNone:
      break;
  }
  return f(ActivationConstant<Activation::kNone>{});
}

template <class V>
Epilogue epilogue_for(Activation activation, DType dtype) {
  return with_activation(activation, [&](auto a) { return epilogue_for_dtype<V, a.value>(dtype); });
}

template <class V>
FloatEpilogue float_epilogue_for(Activation activation, DType dtype) {
  return with_activation(activation, [&](auto a) { return float_epilogue_for_dtype<V, a.value>(dtype); });
}

}  // namespace
}  // namespace tcompress::cpu
