// AVX2 kernels of two_four_linear.h.
//
//   spread_pairs   one vpshufb takes two pairs of eight tokens out of their quads, vpunpck?qdq puts 16 tokens together
//   tile           one output at a time: sums of 64 tokens in four registers, in 16 bits for a run of quads; two runs
//                  are widened together (vpunpck?wd, vpmaddwd by ones), which halves what the widening costs
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")

#include <immintrin.h>

#include "epilogue.h"
#include "transpose_units_avx2.h"
#include "two_four_linear.h"
#include "vec_avx2.h"

namespace tcompress::cpu {
namespace {

constexpr int kVectorBytes = 32;
constexpr int kMaxVectors = kTwoFourTokens / kTwoFourLanes;

// Bytes i, j of each of four quads, then bytes p, q; the same for both halves of a register.
inline __m256i two_pairs(int i, int j, int p, int q) {
  const auto places = [](int first, int second) { return first | second << 8; };
  const int lower = places(i, j), upper = places(p, q);
  const auto next = [](int both) { return both + 0x0404; };
  const int l01 = lower | next(lower) << 16, u01 = upper | next(upper) << 16;
  return _mm256_setr_epi32(l01, l01 + 0x08080808, u01, u01 + 0x08080808, l01, l01 + 0x08080808, u01, u01 + 0x08080808);
}

// Of 16 tokens, a row holds 0 … 3, 8 … 11, 4 … 7, 12 … 15: widening two runs brings them back into order.
void spread_pairs(const uint32_t* quads, int vectors, uint8_t* pairs) {
  const __m256i masks[kPairs / 2] = {two_pairs(0, 1, 0, 2), two_pairs(0, 3, 1, 2), two_pairs(1, 3, 2, 3)};
  for (int q = 0; q < kChunkQuads; ++q, quads += kTwoFourTokens, pairs += kPairs * kPairRowBytes)
    for (int v = 0; v < vectors; ++v) {
      const __m256i* in = reinterpret_cast<const __m256i*>(quads + v * kTwoFourLanes);
      const __m256i first = _mm256_loadu_si256(in), second = _mm256_loadu_si256(in + 1);
#pragma GCC unroll 3
      for (int i = 0; i < kPairs / 2; ++i) {
        const __m256i a = _mm256_shuffle_epi8(first, masks[i]), b = _mm256_shuffle_epi8(second, masks[i]);
        uint8_t* out = pairs + 2 * i * kPairRowBytes + v * kVectorBytes;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi64(a, b));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + kPairRowBytes), _mm256_unpackhi_epi64(a, b));
      }
    }
}

// As assembly, because GCC 12 loads all activations of a row first and then keeps a sum in memory.
inline void multiply_add(__m256i& sum, const uint8_t* a, __m256i w) {
  __m256i product;
  asm("vmovdqu %[a], %[t]\n\tvpmaddubsw %[w], %[t], %[t]\n\tvpaddw %[t], %[s], %[s]"
      : [s] "+x"(sum), [t] "=&x"(product)
      : [a] "m"(*reinterpret_cast<const __m256i_u*>(a)), [w] "x"(w));
}

inline __m256i broadcast_weights(const int8_t* weights) {
  int32_t unit;
  __builtin_memcpy(&unit, weights, sizeof(unit));
  return _mm256_set1_epi32(unit);
}

template <int kVectors, int kRun>
inline void add_run(const uint8_t* pairs, const TwoFourChunk& chunk, int run, __m256i (&sum)[kVectors]) {
  const __m256i start = _mm256_set1_epi16(chunk.starts[run]);
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) sum[v] = start;
#pragma GCC unroll 8
  for (int q = run * kRun; q < (run + 1) * kRun; ++q) {
    const uint8_t* row = pairs + chunk.rows[q] * kPairRowBytes;
    const __m256i w = broadcast_weights(chunk.weights[q]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) multiply_add(sum[v], row + v * kVectorBytes, w);
  }
}

template <int kVectors, int kRun>
inline void add_chunk(const uint8_t* pairs, const TwoFourChunk& chunk, int32_t* acc) {
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
  for (int run = 0; run < kChunkQuads / kRun; run += 2) {
    __m256i one[kVectors], two[kVectors];
    add_run<kVectors, kRun>(pairs, chunk, run, one);
    add_run<kVectors, kRun>(pairs, chunk, run + 1, two);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      __m256i* out = reinterpret_cast<__m256i*>(acc + v * kTwoFourLanes);
      const __m256i lower = _mm256_madd_epi16(_mm256_unpacklo_epi16(one[v], two[v]), ones);
      const __m256i upper = _mm256_madd_epi16(_mm256_unpackhi_epi16(one[v], two[v]), ones);
      _mm256_storeu_si256(out, _mm256_add_epi32(_mm256_loadu_si256(out), lower));
      _mm256_storeu_si256(out + 1, _mm256_add_epi32(_mm256_loadu_si256(out + 1), upper));
    }
  }
}

template <int kVectors>
void tile(const TwoFourTileArgs& args) {
  const TwoFourChunk* chunk = args.weights;
  for (int64_t c = 0; c < args.chunks; ++c) {
    const uint8_t* pairs = args.pairs + c * kChunkBytes;
    for (int64_t n = 0; n < args.outputs; ++n, ++chunk) {
      int32_t* acc = args.acc + n * kTwoFourTokens;
      if (chunk->run == 8)
        add_chunk<kVectors, 8>(pairs, *chunk, acc);
      else if (chunk->run == 4)
        add_chunk<kVectors, 4>(pairs, *chunk, acc);
      else
        add_chunk<kVectors, kTwoFourMinRun>(pairs, *chunk, acc);
    }
  }
}

void tile_any(const TwoFourTileArgs& args) {
  constexpr void (*kTiles[kMaxVectors])(const TwoFourTileArgs&) = {tile<1>, tile<2>, tile<3>, tile<4>};
  kTiles[args.vectors - 1](args);
}

}  // namespace

const TwoFourPath kTwoFourAvx2 = {quantize_row_avx2, transpose_units, spread_pairs, tile_any, epilogue_for<Vec>};

}  // namespace tcompress::cpu

#endif  // __x86_64__
