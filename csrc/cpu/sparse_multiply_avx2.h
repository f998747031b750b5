// Multipliers for sparse_tile.h and sparse_decode.h in ymm registers; include only below a `#pragma GCC target` that
// has avx2 and fma.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace tcompress::cpu {
namespace {

inline __m256i load_256(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

inline __m256i broadcast_256(const uint32_t* p) { return _mm256_set1_epi32(static_cast<int32_t>(*p)); }

// What all multipliers of bytes share.
struct Bytes256 {
  static constexpr bool kRounds = false;
  static constexpr int kLanes = 8;
  using Sum = __m256i;
  using A = __m256i;
  static Sum zero() { return _mm256_setzero_si256(); }
  static Sum load_sum(const uint32_t* p) { return load_256(p); }
  static void store_sum(uint32_t* p, Sum s) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), s); }
  static Sum add(Sum a, Sum b) { return _mm256_add_epi32(a, b); }
  static A load(const uint32_t* p) { return load_256(p); }
  static __m256i broadcast(const uint32_t* p) { return broadcast_256(p); }
  static Sum start(const uint32_t* p) { return broadcast_256(p); }
  static __m256 load_scale(const float* p) { return _mm256_set1_ps(*p); }
  static void add_scaled(float* acc, Sum s, __m256 scale) {
    _mm256_storeu_ps(acc, _mm256_fmadd_ps(_mm256_cvtepi32_ps(s), scale, _mm256_loadu_ps(acc)));
  }
  static A broadcast_activation(const uint32_t* p) { return broadcast_256(p); }
  static __m256i load_weights(const uint32_t* p) { return load_256(p); }
  static A from_units(__m256i units) { return units; }
  static __m256i weights(__m256i units) { return units; }
  static void store_total(uint32_t* p, Sum a, Sum b) {
    const __m256i s = _mm256_add_epi32(a, b);
    __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0b01001110));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0b10110001));
    *p = static_cast<uint32_t>(_mm_cvtsi128_si32(t));
  }
};

struct Floats256 {
  static constexpr bool kRounds = true;
  static constexpr int kLanes = 8;
  using Sum = __m256;
  using A = __m256;
  static __m256 floats(__m256i x) { return _mm256_castsi256_ps(x); }
  static Sum zero() { return _mm256_setzero_ps(); }
  static Sum load_sum(const uint32_t* p) { return floats(load_256(p)); }
  static void store_sum(uint32_t* p, Sum s) { _mm256_storeu_ps(reinterpret_cast<float*>(p), s); }
  static Sum add(Sum a, Sum b) { return _mm256_add_ps(a, b); }
  static A load(const uint32_t* p) { return floats(load_256(p)); }
  static __m256 broadcast(const uint32_t* p) { return floats(broadcast_256(p)); }
  static A broadcast_activation(const uint32_t* p) { return floats(broadcast_256(p)); }
  static __m256 load_weights(const uint32_t* p) { return floats(load_256(p)); }
  static A from_units(__m256i units) { return floats(units); }
  static __m256 weights(__m256i units) { return floats(units); }
  static Sum multiply_add(Sum s, A a, __m256 w) { return _mm256_fmadd_ps(a, w, s); }
  static void store_total(uint32_t* p, Sum a, Sum b) {
    const __m256 s = _mm256_add_ps(a, b);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    t = _mm_add_ss(t, _mm_movehdup_ps(t));
    _mm_store_ss(reinterpret_cast<float*>(p), t);
  }
};

}  // namespace
}  // namespace tcompress::cpu
