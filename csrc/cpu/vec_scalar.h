// One float in the shape of a vector register: the portable build of the templates in quantize_row.h, activation.h and
// epilogue.h. Everything lives in an anonymous namespace, so that no other path's object code can be picked by the
// linker.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"
#include "rounding.h"

namespace tcompress::cpu {
namespace {

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) { return float_from_bits(static_cast<uint32_t>(value.bits) << 16); }

inline float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // inf, NaN
  // Moving the exponent by multiplication also normalises subnormal numbers: 2^112 = 2^(127-15).
  return float_from_bits(sign | bits_from_float(float_from_bits(magnitude << 13) * 0x1p112f));
}

inline void from_float(float value, float* out) { *out = value; }

inline void from_float(float value, BFloat16* out) {
  const uint32_t bits = bits_from_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out->bits = 0x7fc0u;  // NaN: rounding could carry it into infinity
    return;
  }
  out->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // half to even
}

inline void from_float(float value, Float16* out) {
  const uint32_t bits = bits_from_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: subnormal, one unit is 2^-24
    half = bits_from_float(float_from_bits(magnitude) + 0.5f) - bits_from_float(0.5f);
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

struct Vec {
  static constexpr int kLanes = 1;
  float v;

  static Vec set1(float x) { return {x}; }
  template <class T>
  static Vec load(const T* p) {
    return {to_float(*p)};
  }
  // float(p[i] - factor * q[i]), the difference modulo 2^32
  static Vec from_difference(const int32_t* p, int32_t factor, const int32_t* q) {
    const uint32_t difference = static_cast<uint32_t>(*p) - static_cast<uint32_t>(factor) * static_cast<uint32_t>(*q);
    return {static_cast<float>(static_cast<int32_t>(difference))};
  }
  // p[i] -= factor * q[i], modulo 2^32
  static void subtract_product(int32_t* p, int32_t factor, const int32_t* q) {
    *p = static_cast<int32_t>(static_cast<uint32_t>(*p) - static_cast<uint32_t>(factor) * static_cast<uint32_t>(*q));
  }
};

template <class T>
inline void store(T* p, Vec a) {
  from_float(a.v, p);
}

inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
// a*b+c. Rounded twice here: without the hardware instruction, std::fma is a slow library call.
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
// A NaN in the second argument survives.
inline Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec abs(Vec a) { return {__builtin_fabsf(a.v)}; }
inline Vec round_even(Vec a) { return {round_half_even(a.v)}; }
// 2^n for an integral n in [-126, 127], and infinity for 128.
inline Vec exp2_integral(Vec n) {
  return {float_from_bits(static_cast<uint32_t>(static_cast<int32_t>(n.v) + 127) << 23)};
}
// x < 0 ? a : b
inline Vec select_negative(Vec x, Vec a, Vec b) { return {x.v < 0.f ? a.v : b.v}; }
inline float reduce_min(Vec a) { return a.v; }
inline float reduce_max(Vec a) { return a.v; }
inline float reduce_add(Vec a) { return a.v; }

// (clamp(round_half_even(a) + zero_point, lo, hi)) ^ flip, as one byte a lane.
inline void store_quantized(uint8_t* q, Vec a, int32_t zero_point, int32_t lo, int32_t hi, uint8_t flip) {
  int32_t i = static_cast<int32_t>(round_half_even(a.v)) + zero_point;
  i = i < lo ? lo : (i > hi ? hi : i);
  *q = static_cast<uint8_t>(static_cast<uint8_t>(i) ^ flip);
}

}  // namespace
}  // namespace tcompress::cpu
