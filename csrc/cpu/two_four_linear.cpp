// Which paths have a kernel for the layout "2:4"; and the split over threads, tiles of tokens and groups of outputs.

#include "two_four_linear.h"

#include <cstring>

#include "path.h"
#include "threads.h"

namespace tcompress::cpu {
namespace {

constexpr double kMacsPerCycle = 64, kWeightBytes = static_cast<double>(sizeof(TwoFourChunk)) / (kChunkQuads * kQuad);

// Null where the weight has to be unpacked. All of x86's paths but the portable one have AVX2; with AVX-512 its kernel
// does not reach the dense one (docs/design/009), but is faster than unpacking.
const TwoFourPath* path_table(Path path) {
#if defined(__x86_64__)
  if (path != Path::kScalar) return &kTwoFourAvx2;
#endif
  (void)path;
  return nullptr;
}

struct Workspace {
  uint8_t* pairs;    // [chunks] of kChunkBytes, readable for kReadableBytes from each
  uint32_t* rows;    // [64][row_stride]: quantized tokens
  uint32_t* quads;   // [16][64]
  int32_t* sums;     // [kGroup][64]
  uint32_t* turned;  // [64][kGroup]
  float* scale;      // [64]
  int32_t* zero_point;
};

struct Plan {
  const Int8LinearArgs& args;
  const TwoFourPath& path;
  TwoFourLayout layout;
  int64_t row_stride;
  int64_t x_row_bytes, y_element_bytes;
  void (*epilogue)(const EpilogueArgs&);
};

void prepare_tile(const Plan& plan, const Workspace& work, int64_t m0, int64_t rows, int vectors) {
  const Int8LinearArgs& args = plan.args;
  const int64_t chunk_units = kChunkQuads, padded = plan.layout.chunks * kChunkQuads * kQuad;
  const int64_t tokens = vectors * kTwoFourLanes;
  for (int64_t r = 0; r < tokens; ++r) {
    uint32_t* row = work.rows + r * plan.row_stride;
    if (r >= rows) {
      std::memset(row, 0, static_cast<size_t>(padded));
      continue;
    }
    const void* x = static_cast<const char*>(args.x) + (m0 + r) * plan.x_row_bytes;
    plan.path.quantize_row({x, args.x_dtype, args.k, args.act_bits, false, 0, reinterpret_cast<uint8_t*>(row), padded,
                            work.scale + r, work.zero_point + r});
    work.zero_point[r] -= kActivationOffset;
  }
  for (int64_t c = 0; c < plan.layout.chunks; ++c) {
    plan.path.transpose(work.rows + c * chunk_units, plan.row_stride, tokens, chunk_units, work.quads, kTwoFourTokens);
    plan.path.spread_pairs(work.quads, vectors, work.pairs + c * kChunkBytes);
  }
}

void run_group(const Plan& plan, const Workspace& work, int64_t m0, int64_t rows, int vectors, int64_t n0) {
  const Int8LinearArgs& args = plan.args;
  const int64_t outputs = smaller(args.n - n0, kGroup), turned = round_up(outputs, 8);
  std::memset(work.sums, 0, static_cast<size_t>(turned * kTwoFourTokens) * sizeof(int32_t));
  plan.path.tile({work.pairs, vectors,
                  reinterpret_cast<const TwoFourChunk*>(args.kernel_weight + plan.layout.chunk(n0, 0)),
                  plan.layout.chunks, outputs, work.sums});
  plan.path.transpose(reinterpret_cast<const uint32_t*>(work.sums), kTwoFourTokens, turned, vectors * kTwoFourLanes,
                      work.turned, kGroup);
  const int64_t offset = (m0 * args.n + n0) * plan.y_element_bytes;
  const int32_t* column_sums = reinterpret_cast<const int32_t*>(args.kernel_weight + plan.layout.column_sums) + n0;
  plan.epilogue({reinterpret_cast<int32_t*>(work.turned), kGroup, rows, outputs, work.zero_point, work.scale,
                 column_sums, args.weight_scale + n0, args.bias == nullptr ? nullptr : args.bias + n0, args.n, nullptr,
                 args.residual == nullptr ? nullptr : static_cast<const char*>(args.residual) + offset,
                 static_cast<char*>(args.y) + offset});
}

void run_cell(const Plan& plan, const Workspace& work, const Cell& cell) {
  for (int64_t m0 = cell.m0; m0 < cell.m1; m0 += kTwoFourTokens) {
    const int64_t rows = smaller(cell.m1 - m0, kTwoFourTokens);
    const int vectors = static_cast<int>(ceil_div(rows, kTwoFourLanes));
    prepare_tile(plan, work, m0, rows, vectors);
    for (int64_t p = cell.p0; p < cell.p1; p += kGroupPanels) run_group(plan, work, m0, rows, vectors, p * kPanel);
  }
}

void unpacked_linear(Int8LinearArgs args, const TwoFourLayout& layout, int num_threads) {
  const Int8KernelLayout dense(args.n, args.k);
  const int64_t weight_bytes = round_up(args.n * args.k, kCacheLine);
  int8_t* weight = reinterpret_cast<int8_t*>(scratch(weight_bytes + dense.bytes, 1));
  two_four_unpack(args.kernel_weight, layout, weight, num_threads);
  int8_prepack(weight, args.n, args.k, weight + weight_bytes, num_threads);
  args.kernel_weight = weight + weight_bytes;
  int8_linear(args, num_threads);
}

}  // namespace

void two_four_linear(const Int8LinearArgs& args, int num_threads) {
  if (args.m == 0 || args.n == 0) return;
  const TwoFourLayout layout(args.n, args.k);
  const TwoFourPath* path = args.act_symmetric ? nullptr : path_table(current_path());
  if (path == nullptr) {
    unpacked_linear(args, layout, num_threads);
    return;
  }
  const int64_t row_bytes = odd_lines(layout.chunks * kChunkQuads * kQuad);
  const Plan plan{args,
                  *path,
                  layout,
                  row_bytes / kQuad,
                  args.k * element_bytes(args.x_dtype),
                  element_bytes(args.y_dtype),
                  path->epilogue(args.activation, args.y_dtype)};
  const int threads = useful_threads(args.m * args.n * args.k / 2, kMinMacsPerThread, num_threads);
  const Grid grid(args.m, layout.n_panels, {kTwoFourLanes, kMacsPerCycle, kWeightBytes}, threads);

  int64_t size = 0;
  const auto reserve = [&size](int64_t bytes) {
    const int64_t at = size;
    size += round_up(bytes, kCacheLine);
    return at;
  };
  const int64_t at_pairs = reserve(layout.chunks * kChunkBytes + kReadableBytes);
  const int64_t at_rows = reserve(kTwoFourTokens * row_bytes), at_quads = reserve(kChunkQuads * kTwoFourTokens * kQuad);
  const int64_t at_sums = reserve(kGroup * kTwoFourTokens * 4), at_turned = reserve(kGroup * kTwoFourTokens * 4);
  const int64_t at_scale = reserve(kTwoFourTokens * 4), at_zero_point = reserve(kTwoFourTokens * 4);
  uint8_t* memory = scratch(size * grid.cells());
  parallel_tasks(grid.cells(), [&](int t) {
    uint8_t* own = memory + t * size;
    const Workspace work{own + at_pairs,
                         reinterpret_cast<uint32_t*>(own + at_rows),
                         reinterpret_cast<uint32_t*>(own + at_quads),
                         reinterpret_cast<int32_t*>(own + at_sums),
                         reinterpret_cast<uint32_t*>(own + at_turned),
                         reinterpret_cast<float*>(own + at_scale),
                         reinterpret_cast<int32_t*>(own + at_zero_point)};
    const Cell cell = grid.cell(t);
    if (cell.m0 < cell.m1 && cell.p0 < cell.p1) run_cell(plan, work, cell);
  });
}

}  // namespace tcompress::cpu
