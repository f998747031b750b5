// Four floats in a NEON register. Same functions as vec_scalar.h; include only below `#pragma GCC target`.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "dtype.h"

namespace tcompress::cpu {
namespace {

struct Vec {
  static constexpr int kLanes = 4;
  float32x4_t v;

  static Vec set1(float x) { return {vdupq_n_f32(x)}; }
  static Vec load(const float* p) { return {vld1q_f32(p)}; }
  static Vec load(const BFloat16* p) { return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16))}; }
  static Vec load(const Float16* p) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)))}; }
  static Vec from_difference(const int32_t* p, int32_t factor, const int32_t* q) {
    return {vcvtq_f32_s32(vmlsq_s32(vld1q_s32(p), vdupq_n_s32(factor), vld1q_s32(q)))};
  }
  static void subtract_product(int32_t* p, int32_t factor, const int32_t* q) {
    vst1q_s32(p, vmlsq_s32(vld1q_s32(p), vdupq_n_s32(factor), vld1q_s32(q)));
  }
};

inline void store(float* p, Vec a) { vst1q_f32(p, a.v); }

inline void store(BFloat16* p, Vec a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a.v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint16x4_t r = vshrn_n_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd), 16);
  const uint16x4_t number = vmovn_u32(vceqq_f32(a.v, a.v));
  vst1_u16(&p->bits, vbsl_u16(number, r, vdup_n_u16(0x7fc0)));  // rounding could carry a NaN into infinity
}

inline void store(Float16* p, Vec a) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(a.v))); }

inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
// Compared and selected: fmin and fmax order -0 before +0, which the other paths do not. A NaN in b survives.
inline Vec min(Vec a, Vec b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
inline Vec abs(Vec a) { return {vabsq_f32(a.v)}; }
inline Vec round_even(Vec a) { return {vrndnq_f32(a.v)}; }
inline Vec exp2_integral(Vec n) {
  const int32x4_t biased = vaddq_s32(vcvtnq_s32_f32(n.v), vdupq_n_s32(127));
  return {vreinterpretq_f32_s32(vshlq_n_s32(biased, 23))};
}
inline Vec select_negative(Vec x, Vec a, Vec b) { return {vbslq_f32(vcltzq_f32(x.v), a.v, b.v)}; }
inline float reduce_min(Vec a) { return vminvq_f32(a.v); }
inline float reduce_max(Vec a) { return vmaxvq_f32(a.v); }
inline float reduce_add(Vec a) { return vaddvq_f32(a.v); }

inline void store_quantized(uint8_t* q, Vec a, int32_t zero_point, int32_t lo, int32_t hi, uint8_t flip) {
  int32x4_t i = vaddq_s32(vcvtnq_s32_f32(a.v), vdupq_n_s32(zero_point));
  i = vmaxq_s32(vminq_s32(i, vdupq_n_s32(hi)), vdupq_n_s32(lo));
  const int16x4_t narrow = vmovn_s32(i);
  const uint8x8_t b = veor_u8(vreinterpret_u8_s8(vmovn_s16(vcombine_s16(narrow, narrow))), vdup_n_u8(flip));
  const uint32_t bytes = vget_lane_u32(vreinterpret_u32_u8(b), 0);
  __builtin_memcpy(q, &bytes, sizeof(bytes));
}

}  // namespace
}  // namespace tcompress::cpu
