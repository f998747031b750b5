// Sizes in the layouts of attention.h.
#pragma once

#include <cstdint>

namespace tcompress::cpu {

constexpr int kKeyBlock = 64;  // tokens that share a maximum
constexpr int kTokenPanel = 16;
constexpr int kChannelPanel = 16;
constexpr int kQueryTile = 6;      // rows of a register tile
constexpr int kMaxQueryRows = 96;  // rows that pass over a block of keys together
static_assert(kMaxQueryRows % kQueryTile == 0);

constexpr int64_t kMaxHeadDim = 256;
constexpr int kWeightOne = 8192;  // P of the largest key of a block
constexpr int kValueOne = 32767;  // relative scale of the largest value of a block
constexpr int kMaxAttentionBits = 12;
constexpr int kMaxInteger = (1 << (kMaxAttentionBits - 1)) - 1;
static_assert(kMaxHeadDim * kMaxInteger * kMaxInteger < 2147483647, "Q K^T must fit in int32");
static_assert(int64_t{kKeyBlock} * kWeightOne * kMaxInteger < 2147483647, "P V of a block must fit in int32");

namespace {

// D and Dv as they are stored: no channels are stored as some zeros, so that loops over them run at least once.
constexpr int64_t padded(int64_t n, int64_t multiple) {
  return n < 1 ? multiple : (n + multiple - 1) / multiple * multiple;
}
constexpr int64_t padded_d(int64_t d) { return padded(d, 4); }
constexpr int64_t padded_dv(int64_t dv) { return padded(dv, kChannelPanel); }
constexpr int64_t key_block_bytes(int64_t d, bool wide) { return kKeyBlock * padded_d(d) * (wide ? 2 : 1); }
constexpr int64_t value_block_bytes(int64_t dv, bool wide) { return kKeyBlock * padded_dv(dv) * (wide ? 2 : 1); }

constexpr int64_t line_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

}  // namespace tcompress::cpu
