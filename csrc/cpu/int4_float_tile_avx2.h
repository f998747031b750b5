// AVX2 tiles of the weight-only int4 layer: float32 activations. Include below `#pragma GCC target("avx2,fma,f16c")`.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "int4_linear.h"
#include "vec_avx2.h"

namespace tcompress::cpu {
namespace {

constexpr int kFloatRows = 6;        // 6 rows x 2 halves of a panel + 2 weights + 1 activation = 15 registers
constexpr int kNibbles = 2 * kQuad;  // of a 32-bit lane
constexpr int kFloatHalves = kPanel / Vec::kLanes;

// Nibble j of a lane is k = 4 (j mod 2) + j/2 of a pair of steps.
constexpr int k_of_nibble(int j) { return j % 2 * kQuad + j / 2; }

inline __m256 float_zeros(const uint8_t* zero_points) {
  if (zero_points == nullptr) return _mm256_set1_ps(kSymmetricZero);
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zero_points))));
}

// j is a constant after unrolling.
inline __m256 nibble(__m256i lanes, int j, __m256 zeros) {
  const __m256i w = _mm256_and_si256(_mm256_srli_epi32(lanes, 4 * j), _mm256_set1_epi32(15));
  return _mm256_sub_ps(_mm256_cvtepi32_ps(w), zeros);
}

template <int kRows, class Scale>
inline void add_scaled_panel(const __m256 (&sum)[kRows][kFloatHalves], const Scale* scales, float* acc, int width) {
#pragma GCC unroll 2
  for (int h = 0; h < kFloatHalves; ++h) {
    const __m256 scale = Vec::load(scales + h * Vec::kLanes).v;
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      float* at = acc + r * width + h * Vec::kLanes;
      _mm256_storeu_ps(at, _mm256_fmadd_ps(sum[r][h], scale, _mm256_loadu_ps(at)));
    }
  }
}

// One span of one panel; w points to the panel's part of the first step (or pair of steps).
template <int kRows, bool kPacked, class Scale>
inline void float_span(const Int4TileArgs& args, int64_t step, int64_t steps, const void* w, const Scale* scales,
                       const uint8_t* zero_points, float* acc) {
  const char* a = static_cast<const char*>(args.a) + step * kQuad * static_cast<int64_t>(sizeof(float));
  const int width = args.n_panels * kPanel;
  const auto x = [&](int r, int64_t k) {
    return _mm256_set1_ps(reinterpret_cast<const float*>(a + r * args.a_stride)[k]);
  };
  __m256 sum[kRows][kFloatHalves];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int h = 0; h < kFloatHalves; ++h) sum[r][h] = _mm256_setzero_ps();
  if constexpr (kPacked) {
    const uint8_t* packed = static_cast<const uint8_t*>(w);
    for (int64_t k = 0; k < steps * kQuad; k += kNibbles, packed += width * kQuad)
#pragma GCC unroll 2
      for (int h = 0; h < kFloatHalves; ++h) {
        const __m256 zeros = float_zeros(zero_points == nullptr ? nullptr : zero_points + h * Vec::kLanes);
        const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed) + h);
#pragma GCC unroll 8
        for (int j = 0; j < kNibbles; ++j) {
          const __m256 v = nibble(lanes, j, zeros);
#pragma GCC unroll 6
          for (int r = 0; r < kRows; ++r) sum[r][h] = _mm256_fmadd_ps(x(r, k + k_of_nibble(j)), v, sum[r][h]);
        }
      }
  } else {
    const float* floats = static_cast<const float*>(w);
    for (int64_t k = 0; k < steps * kQuad; ++k, floats += width) {
      const __m256 v0 = _mm256_loadu_ps(floats), v1 = _mm256_loadu_ps(floats + Vec::kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const __m256 xr = x(r, k);
        sum[r][0] = _mm256_fmadd_ps(xr, v0, sum[r][0]);
        sum[r][1] = _mm256_fmadd_ps(xr, v1, sum[r][1]);
      }
    }
  }
  add_scaled_panel<kRows>(sum, scales, acc, width);
}

template <int kRows, bool kPacked, class Scale>
void float_tile(const Int4TileArgs& args) {
  const int width = args.n_panels * kPanel;
  const int64_t step_bytes = kPacked ? width * kQuad / 2 : width * kQuad * static_cast<int64_t>(sizeof(float));
  const int64_t panel_bytes = kPacked ? kPanel * kQuad : kPanel * static_cast<int64_t>(sizeof(float));
  for (int p = 0; p < args.n_panels; ++p) {
    const char* w = static_cast<const char*>(args.weights) + p * panel_bytes;
    const Scale* scales = static_cast<const Scale*>(args.scales) + p * kPanel;
    const uint8_t* zero_points = args.zero_points == nullptr ? nullptr : args.zero_points + p * kPanel;
    int64_t in_group = 0;
    for (int64_t step = 0; step < args.steps; step += args.span_steps) {
      const int64_t steps = args.steps - step < args.span_steps ? args.steps - step : args.span_steps;
      float_span<kRows, kPacked>(args, step, steps, w + step * step_bytes, scales, zero_points, args.acc + p * kPanel);
      if (++in_group == args.spans_per_group) {
        in_group = 0;
        scales += width;
        if (zero_points != nullptr) zero_points += width;
      }
    }
  }
}

template <class Scale>
void float_packed(const Int4TileArgs& args) {
  static constexpr Int4Tile kTiles[4] = {float_tile<1, true, Scale>, float_tile<2, true, Scale>,
                                         float_tile<3, true, Scale>, float_tile<4, true, Scale>};
  kTiles[args.rows - 1](args);
}

template <class Scale>
void float_unpacked(const Int4TileArgs& args) {
  static constexpr Int4Tile kTiles[kFloatRows] = {float_tile<1, false, Scale>, float_tile<2, false, Scale>,
                                                  float_tile<3, false, Scale>, float_tile<4, false, Scale>,
                                                  float_tile<5, false, Scale>, float_tile<6, false, Scale>};
  kTiles[args.rows - 1](args);
}

void float_unpack(const Int4ChunkArgs& args) {
  const int width = args.n_panels * kPanel;
  float* out = static_cast<float*>(args.out);
  for (int64_t step = 0; step < args.steps; step += 2, out += kNibbles * width) {
    const uint8_t* zero_points =
        args.zero_points == nullptr ? nullptr : args.zero_points + step / args.group_steps * width;
    for (int n = 0; n < width; n += Vec::kLanes) {
      const __m256i lanes =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(args.weights + (step / 2 * width + n) * kQuad));
      const __m256 zeros = float_zeros(zero_points == nullptr ? nullptr : zero_points + n);
#pragma GCC unroll 8
      for (int j = 0; j < kNibbles; ++j) _mm256_storeu_ps(out + k_of_nibble(j) * width + n, nibble(lanes, j, zeros));
    }
  }
}

}  // namespace
}  // namespace tcompress::cpu
