// Which keys of a block the queries see, and what a mask adds to their scores.
#pragma once

#include <cstdint>

#include "attention.h"
#include "attention_softmax.h"
#include "integers.h"

namespace tcompress::cpu {
namespace {

// A query of a tile: the element (b, h, i, 0) of the mask lies `mask` elements from its start.
struct QueryRow {
  int64_t position;  // i + offset
  int64_t mask;
};

struct KeyRange {
  int first, last;  // keys [first, last) of a block
};

// A block of keys: tokens j0 … j0 + tokens - 1.
struct KeySpan {
  int64_t j0;
  int tokens;
};

inline KeyRange visible_range(const AttentionWindow& window, int64_t position, const KeySpan& span) {
  const auto clamp = [&](int64_t j) { return static_cast<int>(j < 0 ? 0 : smaller(j, span.tokens)); };
  return {window.left < 0 ? 0 : clamp(position - window.left - span.j0),
          window.right < 0 ? span.tokens : clamp(position + window.right + 1 - span.j0)};
}

enum class Sight { kNone, kAll, kSome };

inline Sight join(Sight a, Sight b) { return a == b ? a : Sight::kSome; }

// What a tile's queries, at positions lowest … highest, see of a block by position alone.
inline Sight sight_by_position(const AttentionWindow& window, int64_t lowest, int64_t highest, const KeySpan& span) {
  const int64_t last = span.j0 + span.tokens - 1;
  if (window.right >= 0 && span.j0 > highest + window.right) return Sight::kNone;
  if (window.left >= 0 && last < lowest - window.left) return Sight::kNone;
  if (window.right >= 0 && last > lowest + window.right) return Sight::kSome;
  if (window.left >= 0 && span.j0 < highest - window.left) return Sight::kSome;
  return Sight::kAll;
}

// What one query sees by a boolean mask whose keys lie side by side; kSome where that is not worth finding out.
inline Sight sight_by_mask(const AttentionMask& mask, const QueryRow& row, const KeySpan& span) {
  if (!mask.boolean || mask.stride_j != 1) return Sight::kSome;
  const uint8_t* bytes = static_cast<const uint8_t*>(mask.data) + row.mask + span.j0;
  int seen = 0;
  for (int j = 0; j < span.tokens; ++j) seen += bytes[j];
  return seen == 0 ? Sight::kNone : (seen == span.tokens ? Sight::kAll : Sight::kSome);
}

// 0 for the first keys of a block and -inf for the rest: the row that starts at kEdge + 64 - n shows n keys.
struct Edge {
  float bias[2 * kKeyBlock];
};
constexpr Edge make_edge() {
  Edge edge{};
  for (int j = 0; j < kKeyBlock; ++j) edge.bias[kKeyBlock + j] = -__builtin_inff();
  return edge;
}
alignas(64) constexpr Edge kEdge = make_edge();

template <class V, class T>
inline void add_mask_typed(const T* mask, int64_t stride, int n, float* bias) {
  const V unit = V::set1(kTicksPerNat), lowest = V::set1(kLowestMask);
  for (int j = 0; j < n; j += V::kLanes) {
    T part[V::kLanes] = {};
    for (int e = 0; e < V::kLanes && j + e < n; ++e) part[e] = mask[(j + e) * stride];
    float given[V::kLanes], ticks[V::kLanes];
    store(given, V::load(part));
    store(ticks, max(lowest, V::load(part) * unit));  // NaN survives
    for (int e = 0; e < V::kLanes && j + e < n; ++e) bias[j + e] = given[e] == -__builtin_inff() ? given[e] : ticks[e];
  }
}

// bias[j] = what is added to the score of key j: -inf hides it. Returns whether any entry is NaN or +inf.
template <class V>
inline bool build_bias(const AttentionMask& mask, const QueryRow& row, const KeySpan& span, const KeyRange& range,
                       float* bias) {
  const int64_t start = row.mask + span.j0 * mask.stride_j;
  if (mask.data == nullptr) {
    for (int j = 0; j < span.tokens; ++j) bias[j] = 0.f;
  } else if (mask.boolean) {
    const uint8_t* seen = static_cast<const uint8_t*>(mask.data) + start;
    for (int j = 0; j < span.tokens; ++j) bias[j] = seen[j * mask.stride_j] != 0 ? 0.f : -__builtin_inff();
  } else if (mask.dtype == DType::kFloat32) {
    add_mask_typed<V>(static_cast<const float*>(mask.data) + start, mask.stride_j, span.tokens, bias);
  } else if (mask.dtype == DType::kBFloat16) {
    add_mask_typed<V>(static_cast<const BFloat16*>(mask.data) + start, mask.stride_j, span.tokens, bias);
  } else {
    add_mask_typed<V>(static_cast<const Float16*>(mask.data) + start, mask.stride_j, span.tokens, bias);
  }
  for (int j = 0; j < range.first; ++j) bias[j] = -__builtin_inff();
  for (int j = range.last; j < kKeyBlock; ++j) bias[j] = -__builtin_inff();
  bool odd = false;
  for (int j = 0; j < kKeyBlock; ++j) odd |= !(bias[j] < __builtin_inff());
  return odd;
}

}  // namespace
}  // namespace tcompress::cpu
