// Quantizes tokens and lays them out as attention.h draws it, as a template over a path's vector class. The path's file
// also has, beside Vec:
//
//   void store_integers(int16_t* | int8_t*, Vec)    rounded half to even; they fit
//   magnitude(Vec)                                  the bits without the sign, as a vector of integers,
//   larger(a, b), uint32_t largest_lane(a)          and the larger of these
//   void transpose_words(const int32_t* rows, int64_t stride, int64_t words, int32_t* out)
//       rows [16][stride words] to out [words][16]
//   void interleave(const int16_t* rows, int64_t stride, int16_t* out)      16 channels of two tokens side by side
//   void interleave(const int8_t* rows, int64_t stride, int8_t* out)        and of four
#pragma once

#include <cstdint>

#include "attention.h"
#include "integers.h"
#include "to_float.h"

namespace tcompress::cpu {
namespace {

constexpr float kMinTokenRange = 0x1p-100f;  // quantize_row.h's kMinRange
constexpr int64_t kRowFloats = kMaxHeadDim + 16;

constexpr int largest_integer(int bits) { return (1 << (bits - 1)) - 1; }

constexpr uint32_t kInfinityBits = 0x7f800000u;

// x [n] - minus [n] (or x where it is null) to integers, n a multiple of 16. Returns the scale, NaN (and zeros) where x
// is not finite. A negative sign gives the integers of -x.
template <class V, class T>
__attribute__((always_inline)) inline float quantize_token(const float* x, const float* minus, int64_t n, int q_max,
                                                           float sign, T* out) {
  const auto load = [&](int64_t i) __attribute__((always_inline)) {
    return minus == nullptr ? V::load(x + i) : V::load(x + i) - V::load(minus + i);
  };
  // As integers, magnitudes are ordered as they are as floats, and what is not finite lies above all that is.
  auto largest = magnitude(load(0));
  for (int64_t i = V::kLanes; i < n; i += V::kLanes) largest = larger(largest, magnitude(load(i)));
  const uint32_t bits = largest_lane(largest);
  if (bits >= kInfinityBits) {
    for (int64_t i = 0; i < n; ++i) out[i] = 0;
    return __builtin_nanf("");
  }
  float amax;
  __builtin_memcpy(&amax, &bits, sizeof(amax));
  const float step = 1.f / static_cast<float>(q_max);
  const float wanted = amax * step;
  const float scale = wanted > kMinTokenRange * step ? wanted : kMinTokenRange * step;
  const V inverse = V::set1(sign / scale);
  for (int64_t i = 0; i < n; i += V::kLanes) store_integers(out + i, load(i) * inverse);
  return scale;
}

// A token as float32, zeros up to a multiple of 16: where it lies, or in `row`.
template <class V>
inline const float* load_token(const void* x, DType dtype, int64_t index, int64_t stride, int64_t n, float* row) {
  const char* token = static_cast<const char*>(x) + index * stride * element_bytes(dtype);
  if (dtype == DType::kFloat32 && n % 16 == 0 && n > 0) return reinterpret_cast<const float*>(token);
  row_to_float<V>(token, dtype, n, row);
  for (int64_t i = n; i < padded(n, 16); ++i) row[i] = 0.f;
  return row;
}

// Sums in the order of the tokens within blocks of 64, then of the blocks.
template <class V>
void key_mean(const void* k, DType dtype, int64_t stride, int64_t tokens, int64_t d, float* mean) {
  alignas(64) float total[kRowFloats], sum[kRowFloats], row[kRowFloats];
  const int64_t n = round_up(d, V::kLanes);
  for (int64_t i = 0; i < n; ++i) total[i] = 0.f;
  for (int64_t start = 0; start < tokens; start += kKeyBlock) {
    for (int64_t i = 0; i < n; ++i) sum[i] = 0.f;
    const int64_t end = smaller(tokens, start + kKeyBlock);
    for (int64_t t = start; t < end; ++t) {
      const float* x = load_token<V>(k, dtype, t, stride, d, row);
      for (int64_t i = 0; i < n; i += V::kLanes) store(sum + i, V::load(sum + i) + V::load(x + i));
    }
    for (int64_t i = 0; i < n; i += V::kLanes) store(total + i, V::load(total + i) + V::load(sum + i));
  }
  const float inverse = 1.f / static_cast<float>(tokens);
  for (int64_t i = 0; i < d; ++i) {
    const float m = total[i] * inverse;
    mean[i] = m - m == 0.f ? m : 0.f;
  }
}

template <class V, class T>
struct Packer {
  static constexpr int kRun = 4 / sizeof(T);  // tokens or channels side by side: a 32-bit word
  const PackArgs& args;
  const int64_t dk = padded_d(args.d), dv = padded_dv(args.dv);
  const int q_max = largest_integer(args.bits);
  alignas(64) float row[kRowFloats];
  alignas(64) float mean[kRowFloats];
  alignas(64) T ints[kTokenPanel * kRowFloats];

  explicit Packer(const PackArgs& a) : args(a) {
    for (int64_t i = 0; i < args.d; ++i) mean[i] = args.head.k_mean[i];
    for (int64_t i = args.d; i < padded(args.d, 16); ++i) mean[i] = 0.f;
  }

  float key(int64_t token, T* out) {
    const float* x = load_token<V>(args.k, args.dtype, token, args.k_stride, args.d, row);
    return quantize_token<V>(x, mean, padded(args.d, 16), q_max, 1.f, out);
  }

  float value(int64_t token, T* out) {
    const float* x = load_token<V>(args.v, args.dtype, token, args.v_stride, args.dv, row);
    return quantize_token<V>(x, nullptr, dv, q_max, 1.f, out);
  }

  // 16 tokens from `token` on, of which `n` exist; their place is free.
  void panel(int64_t token, int n) {
    const int64_t place = args.token0 + token, block = place / kKeyBlock, in_block = place % kKeyBlock;
    T* keys = static_cast<T*>(args.head.k) + block * kKeyBlock * dk + in_block * dk;
    for (int t = 0; t < n; ++t) args.head.k_scale[place + t] = key(token + t, ints + t * kRowFloats);
    for (int t = n; t < kTokenPanel; ++t)
      for (int64_t i = 0; i < dk; ++i) ints[t * kRowFloats + i] = 0;
    transpose_words(reinterpret_cast<const int32_t*>(ints), kRowFloats / kRun, dk / kRun,
                    reinterpret_cast<int32_t*>(keys));
    for (int t = 0; t < n; ++t) args.head.v_scale[place + t] = value(token + t, ints + t * kRowFloats);
    for (int t = n; t < kTokenPanel; ++t)
      for (int64_t i = 0; i < dv; ++i) ints[t * kRowFloats + i] = 0;
    T* values = static_cast<T*>(args.head.v) + block * kKeyBlock * dv;
    for (int64_t c = 0; c < dv; c += kChannelPanel)
      for (int t = 0; t < kTokenPanel; t += kRun)
        interleave(ints + t * kRowFloats + c, kRowFloats, values + c * kKeyBlock + (in_block + t) * kChannelPanel);
  }

  // One token among others that stay.
  void single(int64_t token) {
    const int64_t place = args.token0 + token, block = place / kKeyBlock, t = place % kKeyBlock;
    T* keys = static_cast<T*>(args.head.k) + block * kKeyBlock * dk + t / kTokenPanel * kTokenPanel * dk;
    args.head.k_scale[place] = key(token, ints);
    for (int64_t i = 0; i < dk; ++i)
      keys[i / kRun * kTokenPanel * kRun + t % kTokenPanel * kRun + i % kRun] = i < args.d ? ints[i] : T{0};
    args.head.v_scale[place] = value(token, ints);
    T* values = static_cast<T*>(args.head.v) + block * kKeyBlock * dv;
    for (int64_t i = 0; i < dv; ++i)
      values[i / kChannelPanel * kChannelPanel * kKeyBlock + t / kRun * kChannelPanel * kRun +
             i % kChannelPanel * kRun + t % kRun] = i < args.dv ? ints[i] : T{0};
  }

  void run() {
    int64_t token = 0;
    while (token < args.tokens) {
      const int64_t left = args.tokens - token;
      if ((args.token0 + token) % kTokenPanel == 0 && (left >= kTokenPanel || args.whole)) {
        panel(token, static_cast<int>(smaller(left, kTokenPanel)));
        token += kTokenPanel;
      } else {
        single(token++);
      }
    }
  }
};

template <class V>
void pack(const PackArgs& args) {
  if (args.wide) {
    Packer<V, int16_t>(args).run();
  } else {
    Packer<V, int8_t>(args).run();
  }
}

}  // namespace
}  // namespace tcompress::cpu
