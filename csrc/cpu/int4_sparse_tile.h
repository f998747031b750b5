// Unpacking and tiles of int4_sparse_linear.h as templates. Everything is in an anonymous namespace.
//
// A multiplier D is one of sparse_tile.h that also has: start(p) (what a span's sums start from), Scale, load_scale(p)
// (one float in every lane), and add_scaled(acc, s, scale) (adds a span's sums to floats in memory).
//
// An unpacker U has: kSafeBlocks (so many blocks can be summed whatever they hold), list (list_bits), and
// unpack(nibbles, count, values, starts), which returns whether these can be summed.
#pragma once

#include <cstdint>

#include "int4_sparse_linear.h"
#include "sparse_positions.h"
#include "sparse_tile.h"

namespace tcompress::cpu {
namespace {

// Signed activations: sums start from 0, and fit.
struct SignedUnpacker {
  static constexpr int kSafeBlocks = kWordUnits;

  static int list(uint64_t bits, int64_t width, uint32_t first, uint32_t stride, uint32_t* out) {
    return list_bits(bits, width, first, stride, out);
  }

  static bool unpack(const uint8_t* nibbles, int count, uint32_t* values, uint32_t*) {
    int8_t* out = reinterpret_cast<int8_t*>(values);
    for (int b = 0; b < count; ++b, nibbles += kInt4BlockBytes, out += 2 * kInt4BlockBytes)
      for (int i = 0; i < kInt4BlockBytes; ++i) {
        out[i] = static_cast<int8_t>((nibbles[i] & 15) - kInt4Zero);
        out[i + kInt4BlockBytes] = static_cast<int8_t>((nibbles[i] >> 4) - kInt4Zero);
      }
    return true;
  }
};

// Units of a span, at most.
inline int64_t span_units(int group_shift) { return group_shift < 6 ? 1LL << group_shift : kWordUnits; }

inline uint64_t span_mask(int64_t units) { return units == kWordUnits ? ~0ULL : (1ULL << units) - 1; }

template <class U>
int64_t int4_unpack(const Int4SparseUnpackArgs& args) {
  uint32_t cursor[kMaxGroupRows];
  for (int row = 0; row < args.rows; ++row) cursor[row] = args.offsets[row];
  const int64_t width = span_units(args.group_shift);
  Int4Span* span = args.spans;
  uint32_t *positions = args.positions, *values = args.block_values, *starts = args.starts;
  for (int64_t word = 0; word < args.words; ++word) {
    const uint64_t allowed = word + 1 == args.words ? args.last_word : ~0ULL;
    for (int row = 0; row < args.rows; ++row) {
      const uint64_t kept = kept_bits(args.bitmap[row * args.words + word], allowed, cursor[row], args.blocks);
      for (int64_t first = 0; first < kWordUnits; first += width) {
        const int64_t unit = word * kWordUnits + first;
        const int count =
            U::list(kept >> first & span_mask(width), width, static_cast<uint32_t>(unit), args.stride, positions);
        if (count == 0) continue;
        const uint8_t* nibbles = args.values + static_cast<int64_t>(cursor[row]) * kInt4BlockBytes;
        const uint32_t scale = static_cast<uint32_t>(row * args.groups + (unit >> args.group_shift));
        const bool whole = U::unpack(nibbles, count, values, starts);
        for (int done = 0; done < count; ++span, starts += kMaxBlockRows) {
          const int part = whole ? count : (count - done < U::kSafeBlocks ? count - done : U::kSafeBlocks);
          if (!whole) U::unpack(nibbles + done * kInt4BlockBytes, part, values + done * kMaxBlockRows, starts);
          *span = {static_cast<uint32_t>(row), static_cast<uint32_t>(part), scale};
          done += part;
        }
        positions += count;
        values += count * kMaxBlockRows;
        cursor[row] += static_cast<uint32_t>(count);
      }
    }
  }
  return span - args.spans;
}

template <class D, int kOutputs, int kVectors>
void int4_piece(const uint32_t* a, const uint32_t* positions, int count, const uint32_t* values, const uint32_t* starts,
                const float* scales, float* acc, int64_t stride) {
  typename D::Sum sum[kOutputs][kVectors];
#pragma GCC unroll 8
  for (int j = 0; j < kOutputs; ++j)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) sum[j][v] = D::start(starts + j);
  add_blocks<D, kOutputs, kVectors>(a, positions, count, values, sum);
#pragma GCC unroll 8
  for (int j = 0; j < kOutputs; ++j) {
    const auto scale = D::load_scale(scales + j);
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) D::add_scaled(acc + j * stride + v * D::kLanes, sum[j][v], scale);
  }
}

// kOutputs * kPiece sums fill the registers.
template <class D, int kOutputs, int kPiece>
void int4_tile(const Int4SparseTileArgs& args) {
  const uint32_t *positions = args.positions, *values = args.block_values, *starts = args.starts;
  for (const Int4Span* span = args.spans; span < args.spans + args.span_count; ++span) {
    const int count = static_cast<int>(span->count);
    const float* scales = args.scales + static_cast<int64_t>(span->scale) * kMaxBlockRows;
    float* acc = args.acc + static_cast<int64_t>(span->row) * kMaxBlockRows * args.stride;
    for (int v = 0; v < args.vectors;) {
      const int width = piece_width(args.vectors - v, kPiece);
      const auto piece = width == 1   ? int4_piece<D, kOutputs, 1>
                         : width == 2 ? int4_piece<D, kOutputs, (kPiece < 2 ? kPiece : 2)>
                                      : int4_piece<D, kOutputs, kPiece>;
      for (int j = 0; j < kMaxBlockRows; j += kOutputs)
        piece(args.a + v * D::kLanes, positions, count, values + j, starts + j, scales + j,
              acc + j * args.stride + v * D::kLanes, args.stride);
      v += width;
    }
    positions += count;
    values += static_cast<int64_t>(count) * kMaxBlockRows;
    starts += kMaxBlockRows;
  }
}

}  // namespace
}  // namespace tcompress::cpu
