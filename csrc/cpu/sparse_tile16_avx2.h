// AVX2 tiles of sparse_linear.h with sums in 16 bits: bytes 0 … 127 times signed bytes, widened after each run of
// kept blocks (sparse_layout.h), whose length was proved at pack time to keep every lane within 16 bits.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "sparse_linear.h"
#include "sparse_multiply_avx2.h"
#include "sparse_tile.h"

namespace tcompress::cpu {
namespace {

// As assembly, because GCC 12 loads all activations of a unit first and then keeps a sum in memory.
inline void multiply_add16(__m256i& sum, const uint32_t* a, __m256i w) {
  __m256i product;
  asm("vmovdqu %[a], %[t]\n\tvpmaddubsw %[w], %[t], %[t]\n\tvpaddw %[t], %[s], %[s]"
      : [s] "+x"(sum), [t] "=&x"(product)
      : [a] "m"(*reinterpret_cast<const __m256i_u*>(a)), [w] "x"(w));
}

inline void multiply_add16(__m256i& sum, __m256i a, __m256i w) {
  __m256i product;
  asm("vpmaddubsw %[w], %[a], %[t]\n\tvpaddw %[t], %[s], %[s]"
      : [s] "+x"(sum), [t] "=&x"(product)
      : [a] "x"(a), [w] "x"(w));
}

// Sums of 16 bits, two in a lane.
struct Pairs16 : Bytes256 {
  [[gnu::always_inline]] static Sum multiply_add(Sum s, A a, __m256i w) {
    multiply_add16(s, a, w);
    return s;
  }
  static void add_scaled(float* acc, Sum s, __m256 scale) {
    Bytes256::add_scaled(acc, _mm256_madd_epi16(s, _mm256_set1_epi16(1)), scale);
  }
};

inline void widen_into(uint32_t* acc, __m256i sum) {
  const __m256i wide = _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc), _mm256_add_epi32(load_256(acc), wide));
}

// A schedule that sparse_prepack did not write gives wrong sums, but ends.
inline int next_run(int run, int left) { return run == 0 || run > left ? left : run; }

template <int kVectors>
void tile16_one(const SparseTileArgs& args) {
  constexpr int kLanes = Bytes256::kLanes, kTokens = kVectors * kLanes;
  for (int row = 0; row < args.rows; ++row) {
    const int count = count_kept(args, row);
    const uint32_t* values = args.values + args.cursor[row];
    const uint8_t* positions = args.positions + args.cursor[row];
    args.cursor[row] += static_cast<uint32_t>(count);
    uint32_t* acc = args.acc + row * kTokens;
    for (int i = 0; i < count;) {
      const int end = i + next_run(args.runs[row], count - i);
      __m256i sum[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[v] = _mm256_setzero_si256();
      for (; i < end; ++i) {
        const __m256i w = broadcast_256(values + i);
        const uint32_t* unit = args.a + static_cast<int64_t>(positions[i]) * kTokens;
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) multiply_add16(sum[v], unit + v * kLanes, w);
      }
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) widen_into(acc + v * kLanes, sum[v]);
    }
  }
}

template <int kOutputs, int kVectors>
void piece16_eight(const uint32_t* a, const uint32_t* positions, int count, int run, const uint32_t* values,
                   uint32_t* acc, int64_t tokens) {
  constexpr int kLanes = Bytes256::kLanes;
  for (int length; count > 0; count -= length) {
    length = next_run(run, count);
    __m256i sum[kOutputs][kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kOutputs; ++j)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[j][v] = _mm256_setzero_si256();
    add_blocks<Pairs16, kOutputs, kVectors>(a, positions, length, values, sum);
    positions += length;
    values += length * kMaxBlockRows;
#pragma GCC unroll 4
    for (int j = 0; j < kOutputs; ++j)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) widen_into(acc + j * tokens + v * kLanes, sum[j][v]);
  }
}

void tile16_eight(const SparseTileArgs& args) {
  constexpr int kOutputs = 4, kPiece = 2;
  const int tokens = args.vectors * Bytes256::kLanes;
  uint32_t positions[kMaxPositions];
  for (int row = 0; row < args.rows; ++row) {
    const int count = list_positions(args, row, tokens, positions);
    const uint32_t* values = args.values + static_cast<int64_t>(args.cursor[row]) * kMaxBlockRows;
    args.cursor[row] += static_cast<uint32_t>(count);
    uint32_t* acc = args.acc + row * kMaxBlockRows * tokens;
    for (int v = 0; v < args.vectors; v += kPiece)
      for (int j = 0; j < kMaxBlockRows; j += kOutputs) {
        const auto piece = v + 1 < args.vectors ? piece16_eight<kOutputs, kPiece> : piece16_eight<kOutputs, 1>;
        piece(args.a + v * Bytes256::kLanes, positions, count, args.runs[row], values + j,
              acc + j * tokens + v * Bytes256::kLanes, tokens);
      }
  }
}

void tile16_one_any(const SparseTileArgs& args) {
  constexpr SparseTile kTiles[kMaxTileVectors] = {tile16_one<1>, tile16_one<2>, tile16_one<3>, tile16_one<4>,
                                                  tile16_one<5>, tile16_one<6>, tile16_one<7>, tile16_one<8>};
  kTiles[args.vectors - 1](args);
}

}  // namespace
}  // namespace tcompress::cpu
