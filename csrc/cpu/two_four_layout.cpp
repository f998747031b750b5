// Between the storage layout of an int8 weight, [N, K], and the kernel layout drawn in two_four_layout.h.

#include "two_four_layout.h"

#include <atomic>
#include <cstring>

#include "integers.h"
#include "threads.h"

namespace tcompress::cpu {
namespace {

constexpr int kPairPlaces[kPairs][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}};
constexpr int kChunkWeights = kChunkQuads * kQuad;

// The first pair that holds all that is not zero; kPairs where none does.
int pair_of(const int8_t* quad) {
  for (int pair = 0; pair < kPairs; ++pair) {
    const int8_t kept[2] = {quad[kPairPlaces[pair][0]], quad[kPairPlaces[pair][1]]};
    int others = 0;
    for (int i = 0; i < kQuad; ++i) others += quad[i] != 0;
    if (others == (kept[0] != 0) + (kept[1] != 0)) return pair;
  }
  return kPairs;
}

// Fills in the starts of runs of `run` quads; false where one does not fit 16 bits.
bool set_starts(TwoFourChunk& chunk, int run) {
  std::memset(chunk.starts, 0, sizeof(chunk.starts));
  for (int first = 0; first < kChunkQuads; first += run) {
    int positive = 0, negative = 0;
    for (int q = first; q < first + run; ++q)
      for (int i = 0; i < 2; ++i) {
        const int w = chunk.weights[q][i];
        (w > 0 ? positive : negative) += w > 0 ? w : -w;
      }
    constexpr int kBelow = kActivationOffset, kAbove = 127 - kActivationOffset;
    if (kAbove * positive + kBelow * negative > 32767 || kBelow * positive + kAbove * negative > 32768) return false;
    chunk.starts[first / run] = static_cast<int16_t>(-kActivationOffset * (positive - negative));
  }
  chunk.run = static_cast<uint8_t>(run);
  return true;
}

// `w`: the chunk's weights, zero padded.
bool pack_chunk(const int8_t* w, TwoFourChunk& chunk) {
  bool fits = true;
  std::memset(&chunk, 0, sizeof(chunk));
  for (int q = 0; q < kChunkQuads; ++q) {
    int pair = pair_of(w + q * kQuad);
    fits = fits && pair < kPairs;
    pair = pair < kPairs ? pair : 0;
    for (int i = 0; i < 4; ++i) chunk.weights[q][i] = w[q * kQuad + kPairPlaces[pair][i % 2]];
    chunk.rows[q] = static_cast<uint8_t>(q * kPairs + pair);
  }
  int run = kChunkQuads / 2;
  while (!set_starts(chunk, run)) run /= 2;
  return fits;
}

}  // namespace

TwoFourLayout::TwoFourLayout(int64_t n_, int64_t k_)
    : n(n_), k(k_), chunks(ceil_div(k, kChunkWeights)), n_panels(ceil_div(n, kPanel)) {
  column_sums = n * chunks * static_cast<int64_t>(sizeof(TwoFourChunk));
  bytes = column_sums + n_panels * kPanel * static_cast<int64_t>(sizeof(int32_t));
}

int64_t TwoFourLayout::chunk(int64_t output, int64_t index) const {
  const int64_t first = output / kGroup * kGroup;
  return (first * chunks + index * smaller(n - first, kGroup) + output - first) *
         static_cast<int64_t>(sizeof(TwoFourChunk));
}

bool two_four_prepack(const int8_t* weight, const TwoFourLayout& layout, int8_t* packed, int num_threads) {
  int32_t* column_sums = reinterpret_cast<int32_t*>(packed + layout.column_sums);
  std::memset(column_sums, 0, static_cast<size_t>(layout.bytes - layout.column_sums));
  const int threads = useful_threads(layout.n * layout.k, kMinMacsPerThread, num_threads);
  std::atomic<bool> fits{true};
  parallel_tasks(threads, [&](int t) {
    for (int64_t n = layout.n * t / threads; n < layout.n * (t + 1) / threads; ++n) {
      const int8_t* row = weight + n * layout.k;
      for (int64_t c = 0; c < layout.chunks; ++c) {
        int8_t w[kChunkWeights] = {};
        std::memcpy(w, row + c * kChunkWeights,
                    static_cast<size_t>(smaller(layout.k - c * kChunkWeights, kChunkWeights)));
        if (!pack_chunk(w, *reinterpret_cast<TwoFourChunk*>(packed + layout.chunk(n, c)))) fits = false;
      }
      for (int64_t k = 0; k < layout.k; ++k) column_sums[n] += row[k];
    }
  });
  return fits;
}

void two_four_unpack(const int8_t* packed, const TwoFourLayout& layout, int8_t* weight, int num_threads) {
  const int threads = useful_threads(layout.n * layout.k, kMinMacsPerThread, num_threads);
  parallel_tasks(threads, [&](int t) {
    for (int64_t n = layout.n * t / threads; n < layout.n * (t + 1) / threads; ++n)
      for (int64_t c = 0; c < layout.chunks; ++c) {
        const TwoFourChunk& chunk = *reinterpret_cast<const TwoFourChunk*>(packed + layout.chunk(n, c));
        int8_t w[kChunkWeights] = {};
        for (int q = 0; q < kChunkQuads; ++q)
          for (int i = 0; i < 2; ++i) w[q * kQuad + kPairPlaces[chunk.rows[q] % kPairs][i]] = chunk.weights[q][i];
        std::memcpy(weight + n * layout.k + c * kChunkWeights, w,
                    static_cast<size_t>(smaller(layout.k - c * kChunkWeights, kChunkWeights)));
      }
  });
}

}  // namespace tcompress::cpu
