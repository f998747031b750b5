// The table {Path -> functions}, and what all paths share: memory, and the split of the work over threads.
//
// 1. Heads of k and v are packed and then attended to. Where each thread gets about as many whole heads, it does both
//    for one head after the other: no barrier, little memory, and the packed head stays in its cache. Else all heads
//    are packed first, in parts, and the threads take blocks of queries.
// 2. Work is handed out one piece at a time, the long pieces of a causal mask first.
// 3. From a cache: where there are fewer blocks of queries than threads, the keys are split over threads too, and the
//    partial results joined.

#include "attention.h"

#include <atomic>

#include "linear_grid.h"
#include "path.h"
#include "threads.h"

namespace tcompress::cpu {

const AttentionPath& attention_path(Path path) {
  switch (path) {
#if defined(__x86_64__)
    case Path::kAvx2:
    case Path::kAvxVnni:
      return kAttentionAvx2;
    case Path::kAvx512Vnni:
    case Path::kAmx:
      return kAttentionAvx512Vnni;
#elif defined(__aarch64__)
    case Path::kNeon:
      return kAttentionNeon;
#endif
    default:
      return kAttentionScalar;
  }
}

namespace {

constexpr int64_t kMinBlocksPerSplit = 4;  // 256 keys: below, joining costs more than it brings

// Tasks of unequal length, each taken by the next free thread.
template <class Task>
void parallel_queue(int threads, int64_t n, const Task& task) {
  std::atomic<int64_t> next{0};
  parallel_tasks(static_cast<int>(smaller(threads, n)), [&](int thread) {
    for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < n;
         i = next.fetch_add(1, std::memory_order_relaxed))
      task(thread, i);
  });
}

// Bytes that attend_* needs for `rows` queries: RowState in attention_rows.h.
int64_t row_scratch(const AttentionArgs& args, int64_t rows) {
  const int64_t slots = round_up(rows, kQueryTile), tiles = slots / kQueryTile;
  constexpr int64_t kArrays = 10, kTileFloats = 16;
  return slots * (padded(args.d, 16) * 2 + padded_dv(args.dv) * 4 + 3 * 4 + 2 + 16) + 2 * tiles * kTileFloats * 4 +
         kArrays * kCacheLine;
}

// A packed head in one piece of memory.
struct HeadMemory {
  int64_t blocks, k_bytes, v_bytes, scale_bytes, mean_bytes;

  HeadMemory(const AttentionArgs& args, int64_t tokens, bool wide)
      : blocks(ceil_div(tokens, kKeyBlock)),
        k_bytes(blocks * key_block_bytes(args.d, wide)),
        v_bytes(blocks * value_block_bytes(args.dv, wide)),
        scale_bytes(blocks * kKeyBlock * 4),
        mean_bytes(line_up(args.d * 4 + 4)) {}

  int64_t bytes() const { return k_bytes + v_bytes + 2 * scale_bytes + mean_bytes; }

  float* mean(uint8_t* memory) const { return reinterpret_cast<float*>(memory + k_bytes + v_bytes + 2 * scale_bytes); }
  PackedHead head(uint8_t* memory, int64_t tokens) const {
    float* scales = reinterpret_cast<float*>(memory + k_bytes + v_bytes);
    return {memory, scales, memory + k_bytes, scales + scale_bytes / 4, mean(memory), tokens};
  }
};

// A sequence and a head of k and v.
struct Unit {
  int64_t b, kv_head, q_begin, sq, k_begin, skv;
};

Unit unit_at(const AttentionArgs& args, int64_t index) {
  const int64_t b = index / args.kv_heads;
  Unit unit{b, index % args.kv_heads, 0, args.sq, 0, args.skv};
  if (args.q_begin != nullptr) {
    unit.q_begin = args.q_begin[b];
    unit.sq = args.q_begin[b + 1] - args.q_begin[b];
    unit.k_begin = args.k_begin[b];
    unit.skv = args.k_begin[b + 1] - args.k_begin[b];
  }
  return unit;
}

struct Attention {
  const AttentionArgs& args;
  const AttentionPath& path;
  const TokenView &k, &v;
  bool wide;
  int64_t group, longest_q = 0, longest_k = 0, macs = 0;

  Attention(const AttentionArgs& a, const AttentionPath& p, const TokenView& keys, const TokenView& values)
      : args(a), path(p), k(keys), v(values), wide(a.bits > 8 || !p.narrow_prefill), group(a.heads / a.kv_heads) {
    for (int64_t b = 0; b < (a.q_begin == nullptr ? 1 : a.batch); ++b) {
      const Unit unit = unit_at(args, b * args.kv_heads);
      longest_q = unit.sq > longest_q ? unit.sq : longest_q;
      longest_k = unit.skv > longest_k ? unit.skv : longest_k;
      macs += unit.sq * unit.skv * a.heads * (a.d + a.dv) * (a.q_begin == nullptr ? a.batch : 1);
    }
  }

  // Rows that pass over the keys together: whole tiles, evenly long.
  int64_t block_rows(int64_t rows) const {
    const int64_t n = ceil_div(rows, kMaxQueryRows);
    return n == 0 ? kQueryTile : round_up(ceil_div(rows, n), kQueryTile);
  }

  static const char* at(const TokenView& view, const Unit& unit, DType dtype, int64_t token) {
    const int64_t index =
        unit.b * view.stride_b + unit.kv_head * view.stride_h + (unit.k_begin + token) * view.stride_s;
    return static_cast<const char*>(view.data) + index * element_bytes(dtype);
  }

  void mean(const Unit& unit, float* out) const {
    path.mean(at(k, unit, args.dtype, 0), args.dtype, k.stride_s, unit.skv, args.d, out);
  }

  void pack(const Unit& unit, const PackedHead& head, int64_t first, int64_t tokens) const {
    path.pack({args.d, args.dv, args.dtype, args.bits, at(k, unit, args.dtype, first), at(v, unit, args.dtype, first),
               k.stride_s, v.stride_s, first, tokens, head, wide, /*whole=*/true});
  }

  AttentionRows rows(const Unit& unit, const PackedHead& head, int64_t row0, int64_t count, uint8_t* scratch) const {
    const int64_t last = group * unit.sq;
    return {&args,
            unit.b,
            unit.kv_head,
            unit.sq,
            unit.q_begin,
            row0,
            smaller(last, row0 + count),
            0,
            ceil_div(unit.skv, kKeyBlock),
            head,
            nullptr,
            scratch};
  }

  void attend(const AttentionRows& rows) const { wide ? path.attend_wide(rows) : path.attend_narrow(rows); }

  // Each thread takes whole heads.
  void by_head(int64_t units, int threads) const {
    const HeadMemory layout(args, longest_k, wide);
    const int64_t block = block_rows(group * longest_q);
    const int64_t head_bytes = line_up(layout.bytes()), bytes = head_bytes + line_up(row_scratch(args, block));
    uint8_t* memory = scratch(bytes * threads);
    parallel_queue(threads, units, [&](int thread, int64_t index) {
      uint8_t* mine = memory + thread * bytes;
      const Unit unit = unit_at(args, index);
      mean(unit, layout.mean(mine));
      const PackedHead head = layout.head(mine, unit.skv);
      pack(unit, head, 0, unit.skv);
      for (int64_t row = 0; row < group * unit.sq; row += block)
        attend(rows(unit, head, row, block, mine + head_bytes));
    });
  }

  // All heads are packed before blocks of queries are handed out.
  void by_rows(int64_t units, int threads) const {
    const HeadMemory layout(args, longest_k, wide);
    const int64_t head_bytes = line_up(layout.bytes());
    // Blocks short enough that the threads end at about the same time.
    int64_t block = block_rows(group * longest_q);
    while (block > kQueryTile && units * ceil_div(group * longest_q, block) < 4 * threads)
      block = round_up(block / 2, kQueryTile);
    const int64_t blocks = ceil_div(group * longest_q, block), bytes = line_up(row_scratch(args, block));
    uint8_t* memory = scratch(head_bytes * units + bytes * threads);
    const auto head_of = [&](int64_t index, const Unit& unit) {
      return layout.head(memory + index * head_bytes, unit.skv);
    };
    parallel_queue(threads, units,
                   [&](int, int64_t index) { mean(unit_at(args, index), layout.mean(memory + index * head_bytes)); });
    constexpr int64_t kPart = 4 * kKeyBlock;
    const int64_t parts = ceil_div(longest_k, kPart);
    parallel_queue(threads, units * parts, [&](int, int64_t index) {
      const Unit unit = unit_at(args, index / parts);
      const int64_t first = index % parts * kPart;
      if (first < unit.skv) pack(unit, head_of(index / parts, unit), first, smaller(kPart, unit.skv - first));
    });
    parallel_queue(threads, units * blocks, [&](int thread, int64_t index) {
      const Unit unit = unit_at(args, index % units);
      const int64_t row = (blocks - 1 - index / units) * block;  // the last rows see most keys
      if (row < group * unit.sq)
        attend(rows(unit, head_of(index % units, unit), row, block, memory + head_bytes * units + bytes * thread));
    });
  }
};

}  // namespace

void attention(const AttentionArgs& args, const TokenView& k, const TokenView& v, int num_threads) {
  const int64_t units = args.batch * args.kv_heads;
  if (units == 0 || args.heads == 0) return;
  const Attention work(args, attention_path(current_path()), k, v);
  if (work.longest_q == 0) return;
  const int threads = useful_threads(work.macs, kMinMacsPerThread, num_threads);
  const int64_t rounds = ceil_div(units, threads);
  // Idle threads in the last round may cost a tenth.
  if (threads == 1 || units * 10 >= rounds * threads * 9) {
    work.by_head(units, static_cast<int>(smaller(threads, units)));
  } else {
    work.by_rows(units, threads);
  }
}

void kv_cache_attention(const AttentionArgs& args, const KvCacheView& cache, int num_threads) {
  const int64_t units = args.batch * args.kv_heads;
  if (units == 0 || args.heads == 0 || args.sq == 0) return;
  const AttentionPath& path = attention_path(current_path());
  const int64_t group = args.heads / args.kv_heads, rows = group * args.sq;
  const int64_t macs = args.batch * args.heads * args.sq * args.skv * (args.d + args.dv);
  const int threads = useful_threads(macs, kMinMacsPerThread, num_threads);
  const int64_t n = ceil_div(rows, kMaxQueryRows);
  const int64_t block = round_up(ceil_div(rows, n), kQueryTile), blocks = ceil_div(rows, block);
  const int64_t key_blocks = ceil_div(args.skv, kKeyBlock), tasks = units * blocks;
  const int64_t wanted = tasks % threads == 0 ? 1 : ceil_div(4 * threads, tasks);
  const int64_t possible = key_blocks / kMinBlocksPerSplit;
  const int64_t splits = possible < 1 || tasks >= 4 * threads ? 1 : smaller(wanted, possible);

  const int64_t partial = splits == 1 ? 0 : round_up(block * (padded_dv(args.dv) + 3), 16);
  const int64_t bytes = line_up(row_scratch(args, block));
  uint8_t* memory = scratch(bytes * threads + partial * 4 * splits * tasks);
  float* partials = reinterpret_cast<float*>(memory + bytes * threads);
  const auto rows_of = [&](int64_t task) {
    const int64_t unit = task / blocks, row = task % blocks * block;
    const int64_t first = unit * cache.capacity;
    const PackedHead head{cache.k_data + first * key_block_bytes(args.d, false),
                          cache.k_scale + first * kKeyBlock,
                          cache.v_data + first * value_block_bytes(args.dv, false),
                          cache.v_scale + first * kKeyBlock,
                          cache.k_mean + unit * args.d,
                          args.skv};
    return AttentionRows{&args,
                         unit / args.kv_heads,
                         unit % args.kv_heads,
                         args.sq,
                         0,
                         row,
                         smaller(rows, row + block),
                         0,
                         key_blocks,
                         head,
                         nullptr,
                         nullptr};
  };
  parallel_queue(threads, tasks * splits, [&](int thread, int64_t index) {
    const int64_t task = index / splits, split = index % splits;
    AttentionRows part = rows_of(task);
    part.scratch = memory + bytes * thread;
    if (splits > 1) {
      part.partial = partials + (task * splits + split) * partial;
      part.block0 = key_blocks * split / splits;
      part.block1 = key_blocks * (split + 1) / splits;
    }
    path.attend_narrow(part);
  });
  if (splits == 1) return;
  parallel_queue(threads, tasks, [&](int, int64_t task) {
    AttentionRows part = rows_of(task);
    part.partial = partials + task * splits * partial;
    path.combine(part, splits, partial);
  });
}

void kv_cache_append(const KvCacheView& cache, int64_t batch, int64_t kv_heads, int64_t d, int64_t dv, DType dtype,
                     const TokenView& k, const TokenView& v, int64_t s, int64_t length, int num_threads) {
  if (s == 0) return;
  const AttentionPath& path = attention_path(current_path());
  const int64_t units = batch * kv_heads;
  constexpr int64_t kMinElements = 1 << 14;
  const int threads = useful_threads(units * s * (d + dv), kMinElements, num_threads);
  parallel_queue(threads, units, [&](int, int64_t index) {
    const int64_t b = index / kv_heads, h = index % kv_heads;
    const auto at = [&](const TokenView& view) {
      return static_cast<const char*>(view.data) + (b * view.stride_b + h * view.stride_h) * element_bytes(dtype);
    };
    float* mean = cache.k_mean + index * d;
    if (length == 0) path.mean(at(k), dtype, k.stride_s, s, d, mean);
    const int64_t first = index * cache.capacity;
    const PackedHead head{cache.k_data + first * key_block_bytes(d, false),
                          cache.k_scale + first * kKeyBlock,
                          cache.v_data + first * value_block_bytes(dv, false),
                          cache.v_scale + first * kKeyBlock,
                          mean,
                          length + s};
    path.pack({d, dv, dtype, 8, at(k), at(v), k.stride_s, v.stride_s, length, s, head, /*wide=*/false,
               /*whole=*/false});
  });
}

}  // namespace tcompress::cpu
