// From int32 sums to the output's type, as a template over the vector class of a path (vec_*.h):
//
//   y[n] = activation(float(acc[n] - zero_point * column_sum[n]) * scale * weight_scale[n] + bias[n])
//
// The two multiplications and the addition each round once, in this order, in the reference too.
#pragma once

#include "activation.h"
#include "int8_linear.h"

namespace tcompress::cpu {
namespace {

template <class V, Activation kActivation, class Out>
void epilogue_row(const EpilogueArgs& args) {
  constexpr int kLanes = V::kLanes;
  const V scale = V::set1(args.scale);
  Out* y = static_cast<Out*>(args.y);
  const int64_t body = args.n - args.n % kLanes;
  const auto column = [&](int64_t i, const float* weight_scale, const float* bias, Out* out) {
    V::subtract_product(args.acc + i, args.zero_point, args.column_sum + i);
    V v = V::from_int32(args.acc + i) * scale * V::load(weight_scale);
    if (bias != nullptr) v = v + V::load(bias);
    store(out, activate<kActivation>(v));
  };
  for (int64_t i = 0; i < body; i += kLanes)
    column(i, args.weight_scale + i, args.bias == nullptr ? nullptr : args.bias + i, y + i);
  if (body < args.n) {
    // acc and column_sum are padded to a whole panel; the caller's arrays are not.
    float weight_scale[kLanes] = {}, bias[kLanes] = {};
    Out out[kLanes];
    for (int64_t i = body; i < args.n; ++i) {
      weight_scale[i - body] = args.weight_scale[i];
      if (args.bias != nullptr) bias[i - body] = args.bias[i];
    }
    column(body, weight_scale, args.bias == nullptr ? nullptr : bias, out);
    for (int64_t i = body; i < args.n; ++i) y[i] = out[i - body];
  }
}

template <class V>
void epilogue_row_integers(const EpilogueArgs& args) {
  for (int64_t i = 0; i < args.n; i += V::kLanes)
    V::subtract_product(args.acc + i, args.zero_point, args.column_sum + i);
  int32_t* y = static_cast<int32_t*>(args.y);
  for (int64_t i = 0; i < args.n; ++i) y[i] = args.acc[i];
}

using EpilogueRow = void (*)(const EpilogueArgs&);

template <class V, Activation kActivation>
EpilogueRow epilogue_for_dtype(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return epilogue_row<V, kActivation, float>;
    case DType::kBFloat16:
      return epilogue_row<V, kActivation, BFloat16>;
    case DType::kFloat16:
      return epilogue_row<V, kActivation, Float16>;
    case DType::kInt32:
      return epilogue_row_integers<V>;
  }
  return nullptr;
}

template <class V>
EpilogueRow epilogue_for(Activation activation, DType dtype) {
  switch (activation) {
    case Activation::kNone:
      return epilogue_for_dtype<V, Activation::kNone>(dtype);
    case Activation::kRelu:
      return epilogue_for_dtype<V, Activation::kRelu>(dtype);
    case Activation::kGelu:
      return epilogue_for_dtype<V, Activation::kGelu>(dtype);
    case Activation::kGeluTanh:
      return epilogue_for_dtype<V, Activation::kGeluTanh>(dtype);
    case Activation::kSilu:
      return epilogue_for_dtype<V, Activation::kSilu>(dtype);
  }
  return nullptr;
}

}  // namespace
}  // namespace tcompress::cpu
