// AVX-512 tiles of the weight-only int4 layer: float32 activations. A nibble becomes a float by a permutation of a
// 16-entry table, of which vpermps reads an index's low 4 bits only. Include below a `#pragma GCC target` with avx512f.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "int4_linear.h"
#include "vec_avx512.h"

namespace tcompress::cpu {
namespace {

constexpr int kPanelQuad = kPanel * kQuad;  // 64 bytes: one zmm
constexpr int kFloatRows = 8;               // 8 rows x 3 panels of sums + 3 weights + 1 activation = 28 registers
constexpr int kNibbles = 2 * kQuad;         // of a 32-bit lane

// Nibble j of a lane is k = 4 (j mod 2) + j/2 of a pair of steps.
constexpr int k_of_nibble(int j) { return j % 2 * kQuad + j / 2; }

inline __m512 nibble_values(float zero) {
  const __m512 v = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_sub_ps(v, _mm512_set1_ps(zero));
}

inline __m512 float_zeros(const uint8_t* zero_points) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zero_points))));
}

template <int kPanels, class Scale>
inline void add_scaled(const Scale* scales, const __m512 (&sum)[kPanels], float* acc) {
#pragma GCC unroll 3
  for (int p = 0; p < kPanels; ++p)
    _mm512_storeu_ps(acc + p * kPanel,
                     _mm512_fmadd_ps(sum[p], Vec::load(scales + p * kPanel).v, _mm512_loadu_ps(acc + p * kPanel)));
}

// Straight from the packed weights, for up to 4 rows.
template <int kRows, int kPanels, bool kZeroPoints, class Scale>
void float_packed_tile(const Int4TileArgs& args) {
  const __m512 table = nibble_values(kZeroPoints ? 0.f : kSymmetricZero);
  const char* a = static_cast<const char*>(args.a);
  const uint8_t* w = static_cast<const uint8_t*>(args.weights);
  const Scale* scales = static_cast<const Scale*>(args.scales);
  const uint8_t* zero_points = args.zero_points;
  int64_t in_group = 0;
  for (int64_t step = 0; step < args.steps; step += args.span_steps) {
    const int64_t pairs = (args.steps - step < args.span_steps ? args.steps - step : args.span_steps) / 2;
    __m512 sum[kRows][kPanels], zeros[kPanels];
#pragma GCC unroll 3
    for (int p = 0; p < kPanels; ++p) {
      if constexpr (kZeroPoints) zeros[p] = float_zeros(zero_points + p * kPanel);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r][p] = _mm512_setzero_ps();
    }
    for (int64_t i = 0; i < pairs; ++i, w += kPanels * kPanelQuad) {
      const int64_t at = (step + 2 * i) * kQuad * static_cast<int64_t>(sizeof(float));
#pragma GCC unroll 3
      for (int p = 0; p < kPanels; ++p) {
        const __m512i nibbles = _mm512_loadu_si512(w + p * kPanelQuad);
#pragma GCC unroll 8
        for (int j = 0; j < kNibbles; ++j) {
          __m512 v = _mm512_permutexvar_ps(_mm512_srli_epi32(nibbles, 4 * j), table);
          if constexpr (kZeroPoints) v = _mm512_sub_ps(v, zeros[p]);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            const float* x = reinterpret_cast<const float*>(a + r * args.a_stride + at) + k_of_nibble(j);
            sum[r][p] = _mm512_fmadd_ps(_mm512_set1_ps(*x), v, sum[r][p]);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) add_scaled<kPanels>(scales, sum[r], args.acc + r * kPanels * kPanel);
    if (++in_group == args.spans_per_group) {
      in_group = 0;
      scales += kPanels * kPanel;
      if constexpr (kZeroPoints) zero_points += kPanels * kPanel;
    }
  }
}

template <int kRows, int kPanels, class Scale>
void float_unpacked_tile(const Int4TileArgs& args) {
  const char* a = static_cast<const char*>(args.a);
  const float* w = static_cast<const float*>(args.weights);
  const Scale* scales = static_cast<const Scale*>(args.scales);
  int64_t in_group = 0;
  for (int64_t step = 0; step < args.steps; step += args.span_steps) {
    const int64_t span = args.steps - step < args.span_steps ? args.steps - step : args.span_steps;
    __m512 sum[kRows][kPanels];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
      for (int p = 0; p < kPanels; ++p) sum[r][p] = _mm512_setzero_ps();
    for (int64_t k = step * kQuad; k < (step + span) * kQuad; ++k, w += kPanels * kPanel) {
      __m512 v[kPanels];
#pragma GCC unroll 3
      for (int p = 0; p < kPanels; ++p) v[p] = _mm512_loadu_ps(w + p * kPanel);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512 x = _mm512_set1_ps(reinterpret_cast<const float*>(a + r * args.a_stride)[k]);
#pragma GCC unroll 3
        for (int p = 0; p < kPanels; ++p) sum[r][p] = _mm512_fmadd_ps(x, v[p], sum[r][p]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) add_scaled<kPanels>(scales, sum[r], args.acc + r * kPanels * kPanel);
    if (++in_group == args.spans_per_group) {
      in_group = 0;
      scales += kPanels * kPanel;
    }
  }
}

template <class Scale>
void float_packed(const Int4TileArgs& args) {
#define TCOMPRESS_ROWS(r)                                                                                              \
  {                                                                                                                    \
    {float_packed_tile<r, 1, false, Scale>, float_packed_tile<r, 2, false, Scale>,                                     \
     float_packed_tile<r, 3, false, Scale>},                                                                           \
    {                                                                                                                  \
      float_packed_tile<r, 1, true, Scale>, float_packed_tile<r, 2, true, Scale>, float_packed_tile<r, 3, true, Scale> \
    }                                                                                                                  \
  }
  static constexpr Int4Tile kTiles[4][2][kGroupPanels] = {TCOMPRESS_ROWS(1), TCOMPRESS_ROWS(2), TCOMPRESS_ROWS(3),
                                                          TCOMPRESS_ROWS(4)};
#undef TCOMPRESS_ROWS
  kTiles[args.rows - 1][args.zero_points != nullptr][args.n_panels - 1](args);
}

template <class Scale>
void float_unpacked(const Int4TileArgs& args) {
#define TCOMPRESS_ROWS(r)                                                                                \
  {                                                                                                      \
    float_unpacked_tile<r, 1, Scale>, float_unpacked_tile<r, 2, Scale>, float_unpacked_tile<r, 3, Scale> \
  }
  static constexpr Int4Tile kTiles[kFloatRows][kGroupPanels] = {TCOMPRESS_ROWS(1), TCOMPRESS_ROWS(2), TCOMPRESS_ROWS(3),
                                                                TCOMPRESS_ROWS(4), TCOMPRESS_ROWS(5), TCOMPRESS_ROWS(6),
                                                                TCOMPRESS_ROWS(7), TCOMPRESS_ROWS(8)};
#undef TCOMPRESS_ROWS
  kTiles[args.rows - 1][args.n_panels - 1](args);
}

void float_unpack(const Int4ChunkArgs& args) {
  const int width = args.n_panels * kPanel;
  const __m512 table = nibble_values(args.zero_points == nullptr ? kSymmetricZero : 0.f);
  float* out = static_cast<float*>(args.out);
  for (int64_t step = 0; step < args.steps; step += 2, out += kNibbles * width)
    for (int p = 0; p < args.n_panels; ++p) {
      const __m512i nibbles = _mm512_loadu_si512(args.weights + (step / 2 * args.n_panels + p) * kPanelQuad);
      __m512 zeros = _mm512_setzero_ps();
      if (args.zero_points != nullptr)
        zeros = float_zeros(args.zero_points + step / args.group_steps * width + p * kPanel);
#pragma GCC unroll 8
      for (int j = 0; j < kNibbles; ++j)
        _mm512_storeu_ps(out + k_of_nibble(j) * width + p * kPanel,
                         _mm512_sub_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(nibbles, 4 * j), table), zeros));
    }
}

}  // namespace
}  // namespace tcompress::cpu
