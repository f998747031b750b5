// The table {Path -> functions}, and what all paths share: the split over threads, tiles of tokens, groups of outputs.

#include "sparse_linear.h"

#include <unistd.h>

#include <cstring>

#include "path.h"
#include "sparse_split.h"
#include "threads.h"

namespace tcompress::cpu {
namespace {

constexpr int64_t kDecodeTokens = 8;  // up to so many tokens take the way for few
constexpr float kNotFinite = __builtin_nanf("");

// Words of a call for block rows of 1, which divide a segment: those whose activations fit the first-level cache beside
// a group's sums; but a block row with few kept units in a call pays more for the call than for the second-level cache.
int64_t words_of_call(int64_t tokens, double density) {
  if (density <= 0.25) return kSegmentWords;
  static const int64_t l1 = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  const int64_t words = (l1 - kGroup * tokens * kUnitBytes) / (kWordUnits * tokens * kUnitBytes);
  return words >= kSegmentWords ? kSegmentWords : words >= 2 ? 2 : 1;
}

struct Workspace {
  uint32_t* rows;    // [tokens][row_stride]: activations as they come
  uint32_t* units;   // [units][tokens]
  uint32_t* sums;    // [kGroup][tokens]
  uint32_t* turned;  // [tokens][kGroup]
  float* scale;      // [tokens]
  int32_t* zero_point;
  uint32_t* cursor;  // [kGroup]
};

struct Plan {
  const SparseLinearArgs& args;
  const SparseLinearPath& path;
  const SparseLayout layout;
  const SparseKernels& kernels;
  int kind;            // of the kernels: 0 for block rows of 1, 1 for 8
  bool few;            // tokens
  int64_t call_words;  // of a tile call
  int64_t row_stride, tile_tokens;
  int64_t x_row_bytes, y_element_bytes;
  void (*epilogue)(const EpilogueArgs&);
  void (*float_epilogue)(const FloatEpilogueArgs&);

  const uint64_t* bitmap() const { return reinterpret_cast<const uint64_t*>(args.kernel_weight); }
  const uint32_t* offsets() const { return reinterpret_cast<const uint32_t*>(args.kernel_weight + layout.offsets); }
  const uint32_t* values() const { return reinterpret_cast<const uint32_t*>(args.kernel_weight + layout.values); }
  const uint8_t* positions() const { return args.kernel_weight + layout.positions; }
  uint64_t last_word() const {
    const int64_t used = layout.units % kWordUnits;
    return used == 0 ? ~0ULL : (1ULL << used) - 1;
  }
};

struct Cell {
  int64_t m0, m1, group0, group1;
};

bool all_finite(const float* x, int64_t n) {
  uint32_t largest = 0;  // exponent: integers, which a compiler reduces in vectors
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    bits &= 0x7f800000u;
    largest = largest > bits ? largest : bits;
  }
  return largest < 0x7f800000u;
}

// Rows m0 … of x in units, followed by zeros to the end of the last segment: what a vector of positions holds past a
// block row's end meets weights of zero there, which make zeros of numbers only.
void prepare_rows(const Plan& plan, const Workspace& work, int64_t m0, int64_t rows) {
  const SparseLinearArgs& args = plan.args;
  const int64_t padded = round_up(plan.layout.units, kSegmentUnits);
  for (int64_t r = 0; r < rows; ++r) {
    const void* x = static_cast<const char*>(args.x) + (m0 + r) * plan.x_row_bytes;
    uint32_t* row = work.rows + r * plan.row_stride;
    work.zero_point[r] = 0;
    if (args.floats) {
      float* f = reinterpret_cast<float*>(row);
      plan.path.to_float(x, args.x_dtype, args.k, f);
      for (int64_t i = args.k; i < padded; ++i) f[i] = 0.f;
      work.scale[r] = all_finite(f, args.k) ? 1.f : kNotFinite;
      continue;
    }
    const uint8_t flip = args.act_symmetric ? plan.path.symmetric_flip : 0;
    plan.path.quantize_row({x, args.x_dtype, args.k, args.act_bits, args.act_symmetric, flip,
                            reinterpret_cast<uint8_t*>(row), padded * kUnitBytes, work.scale + r, work.zero_point + r});
    if (flip != 0) work.zero_point[r] = flip;
  }
}

// From sums [tokens][kGroup] to the output.
void finish(const Plan& plan, const Workspace& work, const SparseGroup& group, int64_t m0, int64_t rows) {
  const SparseLinearArgs& args = plan.args;
  const int64_t offset = (m0 * args.n + group.n0) * plan.y_element_bytes;
  const float* bias = args.bias == nullptr ? nullptr : args.bias + group.n0;
  const void* residual = args.residual == nullptr ? nullptr : static_cast<const char*>(args.residual) + offset;
  void* y = static_cast<char*>(args.y) + offset;
  if (args.floats) {
    plan.float_epilogue({reinterpret_cast<const float*>(work.turned), kGroup, rows, group.n, work.scale, bias, args.n,
                         nullptr, residual, y});
    return;
  }
  const int32_t* column_sums =
      reinterpret_cast<const int32_t*>(args.kernel_weight + plan.layout.column_sums) + group.n0;
  plan.epilogue({reinterpret_cast<int32_t*>(work.turned), kGroup, rows, group.n, work.zero_point, work.scale,
                 column_sums, args.weight_scale + group.n0, bias, args.n, nullptr, residual, y});
}

void run_few(const Plan& plan, const Workspace& work, const SparseGroup& group, int64_t m0, int64_t rows) {
  const int64_t words = plan.layout.words;
  for (int64_t r = 0; r < rows; r += kMaxDecodeRows)
    plan.kernels.decode[plan.kind](
        {work.rows + r * plan.row_stride, plan.row_stride, static_cast<int>(smaller(rows - r, kMaxDecodeRows)),
         plan.bitmap() + group.row * words, words, plan.last_word(), plan.values(), plan.positions(),
         plan.offsets() + group.row, static_cast<uint32_t>(plan.layout.blocks), static_cast<int>(group.rows),
         work.turned + r * kGroup, kGroup});
  finish(plan, work, group, m0, rows);
}

void run_tile(const Plan& plan, const Workspace& work, const SparseGroup& group, int64_t m0, int64_t rows,
              int vectors) {
  const SparseLayout& layout = plan.layout;
  const int64_t tokens = vectors * plan.path.lanes;
  const uint8_t* runs = plan.args.kernel_weight + layout.runs;
  std::memset(work.sums, 0, static_cast<size_t>(kGroup * tokens) * kUnitBytes);
  std::memcpy(work.cursor, plan.offsets() + group.row, static_cast<size_t>(group.rows) * sizeof(uint32_t));
  const int64_t step = plan.call_words;
  for (int64_t word = 0; word < layout.words; word += step) {
    const int64_t words = smaller(step, layout.words - word), first = group.row * layout.words + word;
    const int64_t begin = plan.kind == 0 ? word / kSegmentWords * kSegmentWords : word;
    plan.kernels.tile[plan.kind](
        {work.units + begin * kWordUnits * tokens, vectors, plan.bitmap() + first, runs + group.row, layout.words,
         words, word + words == layout.words ? plan.last_word() : ~0ULL, plan.values(), plan.positions(), work.cursor,
         static_cast<uint32_t>(layout.blocks), static_cast<int>(group.rows), work.sums});
  }
  plan.path.transpose(work.sums, tokens, round_up(group.n, 8), tokens, work.turned, kGroup);
  finish(plan, work, group, m0, rows);
}

void run_cell(const Plan& plan, const Workspace& work, const Cell& cell) {
  const int64_t lanes = plan.path.lanes;
  for (int64_t m0 = cell.m0; m0 < cell.m1; m0 += plan.tile_tokens) {
    const int64_t rows = smaller(cell.m1 - m0, plan.tile_tokens);
    prepare_rows(plan, work, m0, rows);
    if (plan.few) {
      for (int64_t g = cell.group0; g < cell.group1; ++g)
        run_few(plan, work, SparseGroup(plan.layout.n, plan.layout.block_rows, g), m0, rows);
      continue;
    }
    const int64_t tokens = round_up(rows, lanes);
    for (int64_t r = rows; r < tokens; ++r)
      std::memset(work.rows + r * plan.row_stride, 0, static_cast<size_t>(plan.row_stride) * kUnitBytes);
    plan.path.transpose(work.rows, plan.row_stride, tokens, round_up(plan.layout.units, 8), work.units, tokens);
    for (int64_t g = cell.group0; g < cell.group1; ++g)
      run_tile(plan, work, SparseGroup(plan.layout.n, plan.layout.block_rows, g), m0, rows,
               static_cast<int>(tokens / lanes));
  }
}

}  // namespace

const SparseLinearPath& sparse_linear_path(Path path) {
  switch (path) {
#if defined(__x86_64__)
    case Path::kAvx2:
      return kSparseLinearAvx2;
    case Path::kAvxVnni:
      return kSparseLinearAvxVnni;
    case Path::kAvx512Vnni:
      return kSparseLinearAvx512Vnni;
    case Path::kAmx:
      return kSparseLinearAmx;
#elif defined(__aarch64__)
    case Path::kNeon:
      return kSparseLinearNeon;
#endif
    default:
      return kSparseLinearScalar;
  }
}

void sparse_linear(const SparseLinearArgs& args, int num_threads) {
  if (args.m == 0 || args.n == 0) return;
  const SparseLinearPath& path = sparse_linear_path(current_path());
  const SparseLayout layout(args.n, args.k, args.floats, args.block_rows, args.blocks);
  const SparseKernels& kernels =
      args.floats ? path.floats : (args.act_symmetric ? path.signed_int8 : path.unsigned_int8);
  const int kind = args.block_rows == 1 ? 0 : 1;
  const int64_t lanes = path.lanes;
  const bool few = kernels.decode[kind] != nullptr && args.m <= kDecodeTokens;

  const int64_t unit_macs = args.floats ? 1 : kQuad;
  const int64_t macs = args.m * (args.blocks * args.block_rows * unit_macs + args.n);
  const int threads = useful_threads(macs, kMinMacsPerThread, num_threads);
  // What is done once for every unit of a block row of 1 weighs as much as half of a tile.
  const double fixed = few || kind == 1 ? 0 : static_cast<double>(path.tile_vectors * lanes) / 2;
  const TokenSplit split =
      split_tokens(args.m, args.n, threads, few ? 1 : lanes, few ? kDecodeTokens : path.tile_vectors * lanes, fixed);
  const int64_t tile_tokens = split.tile_tokens;

  const double density = static_cast<double>(args.blocks) / static_cast<double>(layout.rows * layout.units + 1);
  // To the end of the last segment, which positions cannot leave whatever they are.
  const int64_t whole_units = round_up(layout.units, kSegmentUnits);
  const int64_t row_stride = odd_lines(whole_units * kUnitBytes) / kUnitBytes;
  const int64_t call_words = kind == 0 ? words_of_call(path.tile_vectors * lanes, density)
                                       : (kernels.whole_rows ? layout.words : kMaxBlockWords);
  const Plan plan{args,
                  path,
                  layout,
                  kernels,
                  kind,
                  few,
                  call_words,
                  row_stride,
                  tile_tokens,
                  args.k * element_bytes(args.x_dtype),
                  element_bytes(args.y_dtype),
                  args.floats ? nullptr : path.epilogue(args.activation, args.y_dtype),
                  args.floats ? path.float_epilogue(args.activation, args.y_dtype) : nullptr};
  const std::vector<int64_t> groups =
      balanced_groups(args.n, args.block_rows, layout.words, plan.offsets(), split.by_outputs);

  int64_t size = 0;
  const auto reserve = [&size](int64_t words) {
    const int64_t at = size;
    size += round_up(words * kUnitBytes, kCacheLine) / kUnitBytes;
    return at;
  };
  const int64_t at_rows = reserve(tile_tokens * row_stride), at_sums = reserve(kGroup * tile_tokens);
  const int64_t at_units = few ? 0 : reserve(whole_units * tile_tokens);
  const int64_t at_turned = reserve(tile_tokens * kGroup), at_scale = reserve(tile_tokens);
  const int64_t at_zero = reserve(tile_tokens), at_cursor = reserve(kGroup);
  uint32_t* memory = reinterpret_cast<uint32_t*>(scratch(size * kUnitBytes * split.by_tokens * split.by_outputs));
  parallel_tasks(split.by_tokens * split.by_outputs, [&](int t) {
    uint32_t* own = memory + t * size;
    const Workspace work{own + at_rows,
                         own + at_units,
                         own + at_sums,
                         own + at_turned,
                         reinterpret_cast<float*>(own + at_scale),
                         reinterpret_cast<int32_t*>(own + at_zero),
                         own + at_cursor};
    const size_t part = static_cast<size_t>(t % split.by_outputs);
    const int64_t m0 = t / split.by_outputs * split.cell_rows;
    run_cell(plan, work, {m0, smaller(m0 + split.cell_rows, args.m), groups[part], groups[part + 1]});
  });
}

}  // namespace tcompress::cpu
