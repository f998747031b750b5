// Tiles of sparse_linear.h as templates over the multiplier of a path. Everything is in an anonymous namespace.
//
// A multiplier D has: kLanes, kRounds (whether its sums do), Sum (a register), zero(), add(s, t), load_sum(p),
// store_sum(p, s), A (a register of activations, one unit of kLanes tokens), load(p), W (one unit of weights in every
// lane), broadcast(p), and multiply_add(s, a, w).
//
// Sums that round are cut: a long chain of additions loses more digits than torch's sums do. After kMinChain kept units
// or more, its sum is added to the total and a new one begins.
#pragma once

#include <cstdint>

#include "sparse_linear.h"
#include "sparse_positions.h"

namespace tcompress::cpu {
namespace {

// The set bits of a word, none where its blocks would go past the last one.
inline uint64_t kept_bits(uint64_t bits, uint64_t allowed, uint32_t at, uint32_t blocks) {
  bits &= allowed;
  return static_cast<uint64_t>(at) + static_cast<uint64_t>(__builtin_popcountll(bits)) > blocks ? 0 : bits;
}

constexpr int kMinChain = 32;

// A sum takes four or five cycles and two start in each: few vectors need a second set of sums, for every second unit.
constexpr int chains(int vectors) { return vectors > 4 ? 1 : 2; }

// Kept blocks of a block row in its words.
inline int count_kept(const SparseTileArgs& args, int row) {
  uint32_t count = 0;
  for (int64_t word = 0; word < args.words; ++word) {
    const uint64_t allowed = word + 1 == args.words ? args.last_word : ~0ULL;
    count += static_cast<uint32_t>(__builtin_popcountll(
        kept_bits(args.bitmap[row * args.word_stride + word], allowed, args.cursor[row] + count, args.blocks)));
  }
  return static_cast<int>(count);
}

template <class D, int kVectors>
void tile_one(const SparseTileArgs& args) {
  constexpr int kTokens = kVectors * D::kLanes, kChains = chains(kVectors);
  constexpr int kChain = D::kRounds ? kMinChain * 2 : kSegmentUnits;
  for (int row = 0; row < args.rows; ++row) {
    const int count = count_kept(args, row);
    const uint32_t* values = args.values + args.cursor[row];
    const uint8_t* positions = args.positions + args.cursor[row];
    args.cursor[row] += static_cast<uint32_t>(count);
    uint32_t* acc = args.acc + row * kTokens;
    for (int i = 0; i < count;) {
      const int end = count - i < kChain ? count : i + kChain;
      typename D::Sum sum[kChains][kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        for (int chain = 0; chain < kChains; ++chain) sum[chain][v] = D::zero();
      const auto step = [&](int chain) __attribute__((always_inline)) {
        const auto w = D::broadcast(values + i);
        const uint32_t* unit = args.a + static_cast<int64_t>(positions[i]) * kTokens;
        ++i;
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v)
          sum[chain][v] = D::multiply_add(sum[chain][v], D::load(unit + v * D::kLanes), w);
      };
      if (kChains == 2)
        while (i + 1 < end) {
          step(0);
          step(kChains - 1);
        }
      while (i < end) step(0);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        if (kChains == 2) sum[0][v] = D::add(sum[0][v], sum[kChains - 1][v]);
        D::store_sum(acc + v * D::kLanes, D::add(D::load_sum(acc + v * D::kLanes), sum[0][v]));
      }
    }
  }
}

constexpr int kMaxPositions = kMaxBlockWords * kWordUnits + kListSlack;

// Positions of a block row's kept blocks in its words, in units of `stride`; returns their number.
inline int list_positions(const SparseTileArgs& args, int row, int stride, uint32_t* positions) {
  int count = 0;
  for (int64_t word = 0; word < args.words; ++word) {
    const uint64_t allowed = word + 1 == args.words ? args.last_word : ~0ULL;
    const uint64_t bits = kept_bits(args.bitmap[row * args.word_stride + word], allowed,
                                    args.cursor[row] + static_cast<uint32_t>(count), args.blocks);
    count += list_bits(bits, kWordUnits, static_cast<uint32_t>(word * kWordUnits), static_cast<uint32_t>(stride),
                       positions + count);
  }
  return count;
}

// Adds some blocks to sums in registers: kOutputs of a block row's eight, kVectors of the tile's.
template <class D, int kOutputs, int kVectors>
[[gnu::always_inline]] inline void add_blocks(const uint32_t* a, const uint32_t* positions, int count,
                                              const uint32_t* values, typename D::Sum (&sum)[kOutputs][kVectors]) {
  for (int i = 0; i < count; ++i, values += kMaxBlockRows) {
    const uint32_t* unit = a + positions[i];
    typename D::A activations[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) activations[v] = D::load(unit + v * D::kLanes);
#pragma GCC unroll 8
    for (int j = 0; j < kOutputs; ++j) {
      const auto w = D::broadcast(values + j);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sum[j][v] = D::multiply_add(sum[j][v], activations[v], w);
    }
  }
}

template <class D, int kOutputs, int kVectors>
void piece_eight(const uint32_t* a, const uint32_t* positions, int count, const uint32_t* values, uint32_t* acc,
                 int64_t tokens) {
  constexpr int kChain = D::kRounds ? kMinChain * 2 : kMaxBlockWords * kWordUnits;
  for (int first = 0; first < count; first += kChain) {
    const int blocks = count - first < kChain ? count - first : kChain;
    typename D::Sum sum[kOutputs][kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kOutputs; ++j)
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sum[j][v] = D::zero();
    add_blocks<D, kOutputs, kVectors>(a, positions + first, blocks, values + first * kMaxBlockRows, sum);
#pragma GCC unroll 8
    for (int j = 0; j < kOutputs; ++j)
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) {
        uint32_t* total = acc + j * tokens + v * D::kLanes;
        D::store_sum(total, D::add(D::load_sum(total), sum[j][v]));
      }
  }
}

// Vectors of the next piece where `left` are left: 2 + 2 rather than 3 + 1.
inline int piece_width(int left, int most) {
  const int pieces = (left + most - 1) / most;
  return (left + pieces - 1) / pieces;
}

// kOutputs * kPiece sums fill the registers.
template <class D, int kOutputs, int kPiece>
void tile_eight(const SparseTileArgs& args) {
  const int tokens = args.vectors * D::kLanes;
  uint32_t positions[kMaxPositions];
  for (int row = 0; row < args.rows; ++row) {
    const int count = list_positions(args, row, tokens, positions);
    const uint32_t* values = args.values + static_cast<int64_t>(args.cursor[row]) * kMaxBlockRows;
    args.cursor[row] += static_cast<uint32_t>(count);
    if (count == 0) continue;
    uint32_t* acc = args.acc + row * kMaxBlockRows * tokens;
    for (int v = 0; v < args.vectors;) {
      const int width = piece_width(args.vectors - v, kPiece);
      for (int j = 0; j < kMaxBlockRows; j += kOutputs) {
        const auto piece = width == 1   ? piece_eight<D, kOutputs, 1>
                           : width == 2 ? piece_eight<D, kOutputs, (kPiece < 2 ? kPiece : 2)>
                                        : piece_eight<D, kOutputs, kPiece>;
        piece(args.a + v * D::kLanes, positions, count, values + j, acc + j * tokens + v * D::kLanes, tokens);
      }
      v += width;
    }
  }
}

template <class D>
void tile_one_any(const SparseTileArgs& args) {
  constexpr SparseTile kTiles[kMaxTileVectors] = {tile_one<D, 1>, tile_one<D, 2>, tile_one<D, 3>, tile_one<D, 4>,
                                                  tile_one<D, 5>, tile_one<D, 6>, tile_one<D, 7>, tile_one<D, 8>};
  kTiles[args.vectors - 1](args);
}

}  // namespace
}  // namespace tcompress::cpu
