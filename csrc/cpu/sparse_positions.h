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

// Byte i: how many of the bits below bit 8 i are set; the word's own number comes out as `total`. Sums of bytes, so
// that where a byte's places go does not wait for the byte before: popcnt after popcnt were 32 of 35 cycles a word.
inline uint64_t set_below(uint64_t bits, int& total) {
  uint64_t counts = bits - (bits >> 1 & 0x5555555555555555u);
  counts = (counts & 0x3333333333333333u) + (counts >> 2 & 0x3333333333333333u);
  counts = (counts + (counts >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  const uint64_t sums = counts * 0x0101010101010101u;  // at most 64 in a byte
  total = static_cast<int>(sums >> 56);
  return sums << 8;
}

// (first + bit) * stride for each of the lowest `width` bits, a multiple of 8, that is set, none above them; returns
// their number. store(out, kept, first, stride) writes the eight of a byte.
template <class Store>
[[gnu::always_inline]] inline int list_bits(uint64_t bits, int64_t width, uint32_t first, uint32_t stride,
                                            uint32_t* out, const Store& store) {
  int total;
  const uint64_t below = set_below(bits, total);
  for (int64_t i = 0; i < width; i += 8)
    store(out + (below >> i & 255), kKept.of[bits >> i & 255], first + static_cast<uint32_t>(i), stride);
  return total;
}

inline int list_bits(uint64_t bits, int64_t width, uint32_t first, uint32_t stride, uint32_t* out) {
  return list_bits(bits, width, first, stride, out, [](uint32_t* p, const uint8_t* kept, uint32_t f, uint32_t s) {
    for (int j = 0; j < 8; ++j) p[j] = (f + kept[j]) * s;
  });
}

}  // namespace
}  // namespace tcompress::cpu
