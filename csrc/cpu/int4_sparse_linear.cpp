// What all paths share: the split over threads, blocks of tiles of tokens, groups of outputs.

#include "int4_sparse_linear.h"

#include <cstring>
#include <vector>

#include "path.h"
#include "sparse_linear.h"
#include "sparse_split.h"
#include "threads.h"

namespace tcompress::cpu {
namespace {

constexpr int64_t kDecodeTokens = 8;        // up to so many tokens take the way for few
constexpr int64_t kBlockBytes = 512 << 10;  // turned activations of a block of tiles
constexpr double kUnpackTokens = 12;        // unpacking a block costs about as much as multiplying it by so many tokens
constexpr int64_t kMaxSpansOfWord = 8;      // groups of 32, or halves and quarters where sums might not fit

struct Workspace {
  uint32_t* rows;      // [tokens of a tile][row_stride]: activations as they come
  int32_t* excess;     // likewise, few tokens only
  uint32_t* units;     // [tiles][units][tile_tokens]
  float* scales;       // [block rows of a group][groups of K][8]
  float* sums;         // [kGroup][tile_tokens]
  uint32_t* turned;    // [tile_tokens][kGroup]
  float* token_scale;  // [tokens of a block]
  Int4Span* spans;
  uint32_t *positions, *block_values, *starts;
};

struct Plan {
  const Int4SparseLinearArgs& args;
  const SparseLinearPath& path;
  const Int4SparseLayout layout;
  bool few;  // tokens
  uint8_t flip;
  int64_t row_stride, tile_tokens, block_tokens, tile_units;
  int64_t x_row_bytes, y_element_bytes;
  void (*epilogue)(const FloatEpilogueArgs&);

  const uint64_t* bitmap() const { return reinterpret_cast<const uint64_t*>(args.kernel_weight); }
  const uint32_t* offsets() const { return reinterpret_cast<const uint32_t*>(args.kernel_weight + layout.offsets); }
  const uint8_t* values() const { return args.kernel_weight + layout.values; }
  uint64_t last_word() const {
    const int64_t used = layout.units % kWordUnits;
    return used == 0 ? ~0ULL : (1ULL << used) - 1;
  }
  // Of a row in units, and zeros after it.
  int64_t row_units() const { return layout.words * kWordUnits + kInt4ZeroUnits; }
};

struct Cell {
  int64_t m0, m1, group0, group1;
};

// a' of rows m0 … of x, zeros (of a' ^ flip) after them.
void prepare_rows(const Plan& plan, const Workspace& work, int64_t m0, int64_t rows, float* scale) {
  const Int4SparseLinearArgs& args = plan.args;
  for (int64_t r = 0; r < rows; ++r) {
    const void* x = static_cast<const char*>(args.x) + (m0 + r) * plan.x_row_bytes;
    uint8_t* a = reinterpret_cast<uint8_t*>(work.rows + r * plan.row_stride);
    int32_t zero_point = 0;
    plan.path.quantize_row({x, args.x_dtype, args.k, args.act_bits, args.act_symmetric,
                            args.act_symmetric ? plan.flip : uint8_t{0}, a, plan.row_units() * kUnitBytes, scale + r,
                            &zero_point});
    if (args.act_symmetric) continue;
    const uint8_t shift = static_cast<uint8_t>(plan.flip - zero_point);  // adding 128 flips the highest bit
    for (int64_t i = 0; i < args.k && shift != 0; ++i) a[i] = static_cast<uint8_t>(a[i] + shift);
  }
}

void sum_excess(const Plan& plan, const Workspace& work, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    const int8_t* a = reinterpret_cast<const int8_t*>(work.rows + r * plan.row_stride);
    int32_t* sums = work.excess + r * plan.row_stride;
    for (int64_t u = 0; u < plan.row_units(); ++u, a += kQuad) sums[u] = -kInt4Zero * (a[0] + a[1] + a[2] + a[3]);
  }
}

// From float sums [tokens][kGroup] to the output.
void finish(const Plan& plan, const Workspace& work, const SparseGroup& group, int64_t m0, int64_t rows,
            const float* scale) {
  const Int4SparseLinearArgs& args = plan.args;
  const int64_t offset = (m0 * args.n + group.n0) * plan.y_element_bytes;
  plan.epilogue({reinterpret_cast<const float*>(work.turned), kGroup, rows, group.n, scale,
                 args.bias == nullptr ? nullptr : args.bias + group.n0, args.n, nullptr,
                 args.residual == nullptr ? nullptr : static_cast<const char*>(args.residual) + offset,
                 static_cast<char*>(args.y) + offset});
}

void load_scales(const Plan& plan, const Workspace& work, const SparseGroup& group) {
  const Int4SparseLayout& layout = plan.layout;
  const int64_t of_row = layout.groups * kMaxBlockRows;
  plan.path.to_float(plan.args.kernel_weight + layout.scales + group.row * of_row * layout.scale_bytes,
                     plan.args.scale_dtype, group.rows * of_row, work.scales);
}

void run_few(const Plan& plan, const Workspace& work, const SparseGroup& group, int64_t m0, int64_t rows) {
  const Int4SparseLayout& layout = plan.layout;
  load_scales(plan, work, group);
  for (int64_t r = 0; r < rows; r += kMaxInt4DecodeTokens)
    plan.path.int4.decode({work.rows + r * plan.row_stride, work.excess + r * plan.row_stride, plan.row_stride,
                           static_cast<int>(smaller(rows - r, kMaxInt4DecodeTokens)),
                           plan.bitmap() + group.row * layout.words, plan.offsets() + group.row, plan.values(),
                           static_cast<uint32_t>(layout.blocks), static_cast<int>(group.rows), layout.words,
                           plan.last_word(), layout.groups, layout.group_shift, work.scales,
                           reinterpret_cast<float*>(work.turned + r * kGroup), kGroup, work.positions});
  finish(plan, work, group, m0, rows, work.token_scale);
}

void run_group(const Plan& plan, const Workspace& work, const SparseGroup& group, int64_t m0, int64_t rows) {
  const Int4SparseLayout& layout = plan.layout;
  load_scales(plan, work, group);
  const int64_t spans = plan.path.int4.unpack(
      {plan.bitmap() + group.row * layout.words, plan.offsets() + group.row, plan.values(),
       static_cast<uint32_t>(layout.blocks), static_cast<int>(group.rows), layout.words, plan.last_word(),
       layout.groups, layout.group_shift, static_cast<uint32_t>(plan.tile_tokens), work.spans, work.positions,
       work.block_values, work.starts});
  for (int64_t r = 0; r < rows; r += plan.tile_tokens) {
    const int64_t tokens = smaller(rows - r, plan.tile_tokens);
    const int64_t vectors = ceil_div(tokens, plan.path.lanes);
    std::memset(work.sums, 0, static_cast<size_t>(kGroup * plan.tile_tokens) * sizeof(float));
    plan.path.int4.tile({work.units + r / plan.tile_tokens * plan.tile_units, static_cast<int>(vectors),
                         plan.tile_tokens, work.spans, spans, work.positions, work.block_values, work.starts,
                         work.scales, work.sums});
    plan.path.transpose(reinterpret_cast<const uint32_t*>(work.sums), plan.tile_tokens, round_up(group.n, 8),
                        vectors * plan.path.lanes, work.turned, kGroup);
    finish(plan, work, group, m0 + r, tokens, work.token_scale + r);
  }
}

void run_cell(const Plan& plan, const Workspace& work, const Cell& cell) {
  const auto group = [&](int64_t g) { return SparseGroup(plan.layout.n, kMaxBlockRows, g); };
  for (int64_t m0 = cell.m0; m0 < cell.m1; m0 += plan.block_tokens) {
    const int64_t rows = smaller(cell.m1 - m0, plan.block_tokens);
    if (plan.few) {
      prepare_rows(plan, work, m0, rows, work.token_scale);
      sum_excess(plan, work, rows);
      for (int64_t g = cell.group0; g < cell.group1; ++g) run_few(plan, work, group(g), m0, rows);
      continue;
    }
    for (int64_t r = 0; r < rows; r += plan.tile_tokens) {
      const int64_t tokens = smaller(rows - r, plan.tile_tokens), padded = round_up(tokens, plan.path.lanes);
      prepare_rows(plan, work, m0 + r, tokens, work.token_scale + r);
      for (int64_t t = tokens; t < padded; ++t)
        std::memset(work.rows + t * plan.row_stride, 0, static_cast<size_t>(plan.row_stride) * kUnitBytes);
      plan.path.transpose(work.rows, plan.row_stride, padded, round_up(plan.layout.units, 8),
                          work.units + r / plan.tile_tokens * plan.tile_units, plan.tile_tokens);
    }
    for (int64_t g = cell.group0; g < cell.group1; ++g) run_group(plan, work, group(g), m0, rows);
  }
}

}  // namespace

void int4_sparse_linear(const Int4SparseLinearArgs& args, int num_threads) {
  if (args.m == 0 || args.n == 0) return;
  const SparseLinearPath& path = sparse_linear_path(current_path());
  const Int4SparseLayout layout(args.n, args.k, args.group_size, args.scale_dtype, args.blocks);
  const bool few = path.int4.decode != nullptr && args.m <= kDecodeTokens;
  const int64_t macs = args.m * (args.blocks * kMaxBlockRows * kQuad + args.n);
  const int threads = useful_threads(macs, kMinMacsPerThread, num_threads);
  const TokenSplit split = split_tokens(args.m, args.n, threads, few ? 1 : path.lanes,
                                        few ? kDecodeTokens : path.tile_vectors * path.lanes, few ? 0 : kUnpackTokens);

  const int64_t row_stride = odd_lines((layout.words * kWordUnits + kInt4ZeroUnits) * kUnitBytes) / kUnitBytes;
  const int64_t tile_units = round_up(layout.units, 8) * split.tile_tokens;
  const int64_t fitting = kBlockBytes / (tile_units * kUnitBytes + 1);
  const int64_t tiles = few ? 1 : smaller(fitting > 1 ? fitting : 1, ceil_div(split.cell_rows, split.tile_tokens));
  const Plan plan{args,
                  path,
                  layout,
                  few,
                  few ? uint8_t{0} : path.int4.flip,
                  row_stride,
                  split.tile_tokens,
                  tiles * split.tile_tokens,
                  tile_units,
                  args.k * element_bytes(args.x_dtype),
                  element_bytes(args.y_dtype),
                  path.float_epilogue(args.activation, args.y_dtype)};
  const std::vector<int64_t> groups =
      balanced_groups(args.n, kMaxBlockRows, layout.words, plan.offsets(), split.by_outputs);

  int64_t size = 0;
  const auto reserve = [&size](int64_t words) {
    const int64_t at = size;
    size += round_up(words * kUnitBytes, kCacheLine) / kUnitBytes;
    return at;
  };
  const int64_t most_blocks = few ? 0 : kMaxGroupRows * layout.words * kWordUnits;
  const int64_t most_spans = few ? 0 : kMaxGroupRows * layout.words * kMaxSpansOfWord;
  constexpr int64_t kSpanWords = static_cast<int64_t>(sizeof(Int4Span)) / kUnitBytes;
  const int64_t at_rows = reserve(split.tile_tokens * row_stride);
  const int64_t at_excess = reserve(few ? split.tile_tokens * row_stride : 0);
  const int64_t at_units = reserve(few ? 0 : tiles * tile_units);
  const int64_t at_scales = reserve(kMaxGroupRows * layout.groups * kMaxBlockRows);
  const int64_t at_sums = reserve(kGroup * split.tile_tokens), at_turned = reserve(split.tile_tokens * kGroup);
  const int64_t at_token_scale = reserve(plan.block_tokens);
  const int64_t at_spans = reserve(most_spans * kSpanWords),
                at_positions = reserve(few ? int4_list_words(layout.words) : most_blocks + kWordUnits);
  const int64_t at_values = reserve(most_blocks * kMaxBlockRows), at_starts = reserve(most_spans * kMaxBlockRows);
  uint32_t* memory = reinterpret_cast<uint32_t*>(scratch(size * kUnitBytes * split.by_tokens * split.by_outputs));
  parallel_tasks(split.by_tokens * split.by_outputs, [&](int t) {
    uint32_t* own = memory + t * size;
    const auto floats = [own](int64_t at) { return reinterpret_cast<float*>(own + at); };
    const Workspace work{own + at_rows,          reinterpret_cast<int32_t*>(own + at_excess),
                         own + at_units,         floats(at_scales),
                         floats(at_sums),        own + at_turned,
                         floats(at_token_scale), reinterpret_cast<Int4Span*>(own + at_spans),
                         own + at_positions,     own + at_values,
                         own + at_starts};
    const size_t part = static_cast<size_t>(t % split.by_outputs);
    const int64_t m0 = t / split.by_outputs * split.cell_rows;
    run_cell(plan, work, {m0, smaller(m0 + split.cell_rows, args.m), groups[part], groups[part + 1]});
  });
}

}  // namespace tcompress::cpu
