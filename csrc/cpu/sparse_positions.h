// The set bits of a bitmap as a list, eight bits at a time: no branch depends on which are set.
#pragma once

#include <cstdint>

namespace tcompress::cpu {
namespace {

constexpr int kListSlack = 8;  // elements that may be written after a list

// For each set of eight bits, which are set; 0 in the rest.
struct KeptTable {
  uint8_t of[256][8];

  constexpr KeptTable() : of{} {
    for (int bits = 0; bits < 256; ++bits) {
      int count = 0;
      for (int bit = 0; bit < 8; ++bit)
        if ((bits >> bit & 1) != 0) of[bits][count++] = static_cast<uint8_t>(bit);
    }
  }
};

constexpr KeptTable kKept;

// (first + bit) * stride for each of the lowest `width` bits, a multiple of 8, that is set; returns their number.
// store(out, kept, first, stride) writes the eight of a byte.
template <class Store>
[[gnu::always_inline]] inline int list_bits(uint64_t bits, int64_t width, uint32_t first, uint32_t stride,
                                            uint32_t* out, const Store& store) {
  const uint32_t* const begin = out;
  for (int64_t i = 0; i < width; i += 8, bits >>= 8, first += 8) {
    store(out, kKept.of[bits & 255], first, stride);
    out += __builtin_popcountll(bits & 255);
  }
  return static_cast<int>(out - begin);
}

inline int list_bits(uint64_t bits, int64_t width, uint32_t first, uint32_t stride, uint32_t* out) {
  return list_bits(bits, width, first, stride, out, [](uint32_t* p, const uint8_t* kept, uint32_t f, uint32_t s) {
    for (int j = 0; j < 8; ++j) p[j] = (f + kept[j]) * s;
  });
}

}  // namespace
}  // namespace tcompress::cpu
