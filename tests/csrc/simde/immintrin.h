// Stands for the compiler's <immintrin.h> when test_other_processors.py builds a file of csrc/cpu for a processor that
// this one is not: every intrinsic in plain C, by SIMDe, without any instruction beyond the baseline.
//
// Below is what SIMDe 0.7.4 lacks, each as a loop over its lanes by the definition in Intel's guide.
#pragma once

#define SIMDE_NO_NATIVE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

// to[i] = f(from[i]) for all lanes.
template <class To, class ToLane, class FromLane, class From, class F>
To map_lanes(From from, F f) {
  constexpr int kLanes = sizeof(To) / sizeof(ToLane);
  static_assert(kLanes * sizeof(FromLane) == sizeof(From));
  FromLane in[kLanes];
  ToLane out[kLanes];
  std::memcpy(in, &from, sizeof(in));
  for (int i = 0; i < kLanes; ++i) out[i] = f(in[i]);
  To to;
  std::memcpy(&to, out, sizeof(to));
  return to;
}

template <class To, class ToLane, class FromLane, class From>
To convert_lanes(From from) {
  return map_lanes<To, ToLane, FromLane>(from, [](FromLane x) { return static_cast<ToLane>(x); });
}

template <class F>
float reduce_lanes(simde__m512 from, F f) {
  float in[16];
  std::memcpy(in, &from, sizeof(in));
  for (int n = 8; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) in[i] = f(in[i], in[i + n]);
  return in[0];
}

inline simde__m256i dpbusd(simde__m256i sum, simde__m256i a, simde__m256i b) {
  uint32_t lanes[8];
  uint8_t u[32];
  int8_t s[32];
  std::memcpy(lanes, &sum, sizeof(lanes));
  std::memcpy(u, &a, sizeof(u));
  std::memcpy(s, &b, sizeof(s));
  for (int i = 0; i < 32; ++i) lanes[i / 4] += static_cast<uint32_t>(u[i] * s[i]);
  std::memcpy(&sum, lanes, sizeof(sum));
  return sum;
}

inline simde__m512i expand(uint32_t keep, simde__m512i from) {
  uint32_t in[16], out[16] = {};
  std::memcpy(in, &from, sizeof(in));
  for (int i = 0, next = 0; i < 16; ++i)
    if ((keep >> i & 1) != 0) out[i] = in[next++];
  std::memcpy(&from, out, sizeof(out));
  return from;
}

inline int32_t sum_of_int32(simde__m512i from) {
  uint32_t in[16], sum = 0;
  std::memcpy(in, &from, sizeof(in));
  for (uint32_t lane : in) sum += lane;
  return static_cast<int32_t>(sum);
}

inline float half_to_float(uint16_t bits) { return simde_float16_to_float32(simde_uint16_as_float16(bits)); }
inline uint16_t float_to_half(float x) { return simde_float16_as_uint16(simde_float16_from_float32(x)); }

// The current rounding is to nearest, ties to even; what does not fit becomes the smallest number.
inline int32_t nearest_int32(float x) {
  return x >= -0x1p31f && x < 0x1p31f ? static_cast<int32_t>(std::nearbyintf(x)) : INT32_MIN;
}

}  // namespace

#define _mm256_dpbusd_avx_epi32(sum, a, b) dpbusd(sum, a, b)
#define _mm512_cvtepu8_epi32(a) (convert_lanes<simde__m512i, int32_t, uint8_t>(a))
#define _mm512_cvtepi32_epi8(a) (convert_lanes<simde__m128i, int8_t, int32_t>(a))
#define _mm512_cvtepi32_epi16(a) (convert_lanes<simde__m256i, int16_t, int32_t>(a))
#define _mm512_cvtepi32_ps(a) (convert_lanes<simde__m512, float, int32_t>(a))
#define _mm512_cvtepu16_epi32(a) (convert_lanes<simde__m512i, int32_t, uint16_t>(a))
#define _mm512_cvtps_epi32(a) (map_lanes<simde__m512i, int32_t, float>(a, nearest_int32))
#define _mm512_cvtph_ps(a) (map_lanes<simde__m512, float, uint16_t>(a, half_to_float))
#define _mm512_cvtps_ph(a, rounding) (map_lanes<simde__m256i, uint16_t, float>(a, float_to_half))
#define _mm512_maskz_expand_epi32(keep, a) expand(keep, a)
#define _mm512_reduce_add_epi32(a) sum_of_int32(a)
#define _mm512_reduce_add_ps(a) reduce_lanes(a, [](float x, float y) { return x + y; })
#define _mm512_reduce_min_ps(a) reduce_lanes(a, [](float x, float y) { return x < y ? x : y; })
#define _mm512_reduce_max_ps(a) reduce_lanes(a, [](float x, float y) { return x > y ? x : y; })
// SIMDe has these, but a slip in its f16c.h keeps their native names undefined.
#define _mm256_cvtph_ps(a) simde_mm256_cvtph_ps(a)
#define _mm256_cvtps_ph(a, rounding) simde_mm256_cvtps_ph(a, rounding)
#if !defined(_MM_FROUND_NO_EXC)
#define _MM_FROUND_NO_EXC SIMDE_MM_FROUND_NO_EXC
#endif
#if !defined(__mmask16)
#define __mmask16 simde__mmask16
#endif
