// Between a dense 4-bit weight [N, K] and the kernel layout drawn in int4_sparse_layout.h.

#include "int4_sparse_layout.h"

#include <cstring>

#include "linear_grid.h"
#include "threads.h"

namespace tcompress::cpu {
namespace {

constexpr int kOneGroupShift = 62;

void pack_row(const Int4SparsePrepackArgs& args, const Int4SparseLayout& layout, int64_t row, uint32_t offset,
              uint8_t* packed) {
  const SparseWeightView view{args.weight, layout.n, layout.k, false, kMaxBlockRows};
  uint64_t* bitmap = reinterpret_cast<uint64_t*>(packed) + row * layout.words;
  uint8_t* block = packed + layout.values + static_cast<int64_t>(offset) * kInt4BlockBytes;
  for (int64_t word = 0; word < layout.words; ++word) {
    uint64_t bits = 0;
    for (int64_t u = word * kWordUnits; u < layout.units && u < (word + 1) * kWordUnits; ++u) {
      uint32_t units[kMaxBlockRows];
      if (!read_block(view, row, u, units)) continue;
      bits |= 1ULL << (u % kWordUnits);
      int8_t weights[kMaxBlockRows * kQuad];
      std::memcpy(weights, units, sizeof(weights));
      for (int i = 0; i < kInt4BlockBytes; ++i)
        block[i] = static_cast<uint8_t>(((weights[i] + kInt4Zero) & 15) |
                                        ((weights[i + kInt4BlockBytes] + kInt4Zero) & 15) << 4);
      block += kInt4BlockBytes;
    }
    bitmap[word] = bits;
  }
}

// Copies a block row's scales from [8][G] to [G][8], or back.
void copy_scales(const Int4SparseLayout& layout, int64_t row, uint8_t* packed, uint8_t* plain, bool pack) {
  const size_t size = static_cast<size_t>(layout.scale_bytes);
  for (int64_t g = 0; g < layout.groups; ++g)
    for (int64_t j = 0; j < kMaxBlockRows; ++j) {
      uint8_t* there = packed + layout.scales + ((row * layout.groups + g) * kMaxBlockRows + j) * layout.scale_bytes;
      const int64_t n = row * kMaxBlockRows + j;
      uint8_t* here = plain + (n * layout.groups + g) * layout.scale_bytes;
      if (n >= layout.n) {
        if (pack) std::memset(there, 0, size);
      } else {
        std::memcpy(pack ? there : here, pack ? here : there, size);
      }
    }
}

}  // namespace

Int4SparseLayout::Int4SparseLayout(int64_t n_, int64_t k_, int64_t group_size, DType scale_dtype, int64_t blocks_)
    : n(n_),
      k(k_),
      units(ceil_div(k, kQuad)),
      rows(ceil_div(n, kMaxBlockRows)),
      words(ceil_div(units, kWordUnits)),
      groups(k / group_size + (k % group_size != 0)),
      blocks(blocks_),
      group_shift(groups > 1 ? __builtin_ctzll(static_cast<uint64_t>(group_size / kQuad)) : kOneGroupShift),
      scale_bytes(element_bytes(scale_dtype)) {
  offsets = rows * words * static_cast<int64_t>(sizeof(uint64_t));
  scales = offsets + (rows + 1) * static_cast<int64_t>(sizeof(uint32_t));
  values = round_up(scales + rows * groups * kMaxBlockRows * scale_bytes, kCacheLine);
  bytes = values + blocks * kInt4BlockBytes + kSparsePad;
}

void int4_sparse_prepack(const Int4SparsePrepackArgs& args, const Int4SparseLayout& layout, uint8_t* packed,
                         int num_threads) {
  const int64_t scales_end = layout.scales + layout.rows * layout.groups * kMaxBlockRows * layout.scale_bytes;
  std::memset(packed + scales_end, 0, static_cast<size_t>(layout.values - scales_end));
  std::memset(packed + layout.bytes - kSparsePad, 0, kSparsePad);
  uint32_t* offsets = reinterpret_cast<uint32_t*>(packed + layout.offsets);
  uint32_t total = 0;
  for (int64_t row = 0; row < layout.rows; ++row) {
    offsets[row] = total;
    total += static_cast<uint32_t>(args.counts[row]);
  }
  offsets[layout.rows] = total;
  uint8_t* scale = static_cast<uint8_t*>(const_cast<void*>(args.scale));  // read only
  const int threads = useful_threads(layout.n * layout.k, kMinMacsPerThread, num_threads);
  parallel_tasks(threads, [&](int t) {
    for (int64_t row = layout.rows * t / threads; row < layout.rows * (t + 1) / threads; ++row) {
      pack_row(args, layout, row, offsets[row], packed);
      copy_scales(layout, row, packed, scale, true);
    }
  });
}

void int4_sparse_unpack(const uint8_t* packed, const Int4SparseLayout& layout, int8_t* weight, void* scale,
                        int num_threads) {
  const uint64_t* bitmap = reinterpret_cast<const uint64_t*>(packed);
  const uint32_t* offsets = reinterpret_cast<const uint32_t*>(packed + layout.offsets);
  std::memset(weight, 0, static_cast<size_t>(layout.n * layout.k));
  const int threads = useful_threads(layout.n * layout.k, kMinMacsPerThread, num_threads);
  parallel_tasks(threads, [&](int t) {
    for (int64_t row = layout.rows * t / threads; row < layout.rows * (t + 1) / threads; ++row) {
      copy_scales(layout, row, const_cast<uint8_t*>(packed), static_cast<uint8_t*>(scale), false);
      int64_t at = offsets[row];
      for (int64_t u = 0; u < layout.units; ++u) {
        if ((bitmap[row * layout.words + u / kWordUnits] >> (u % kWordUnits) & 1) == 0 || at >= layout.blocks) continue;
        const uint8_t* block = packed + layout.values + at * kInt4BlockBytes;
        for (int64_t j = 0; j < smaller(kMaxBlockRows, layout.n - row * kMaxBlockRows); ++j)
          for (int64_t i = 0; i < smaller(kQuad, layout.k - u * kQuad); ++i) {
            const int both = block[j % kInt4BlockQuads * kQuad + i];
            const int nibble = j < kInt4BlockQuads ? both & 15 : both >> 4;
            weight[(row * kMaxBlockRows + j) * layout.k + u * kQuad + i] = static_cast<int8_t>(nibble - kInt4Zero);
          }
        ++at;
      }
    }
  });
}

}  // namespace tcompress::cpu
