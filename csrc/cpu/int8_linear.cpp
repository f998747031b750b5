// The table {Path -> functions}, and what all paths share: packing, the split over threads, the order of the tiles.
//
// 1. The output is cut into a grid of row and panel ranges, one cell a thread; a thread quantizes its own rows, so no
//    barrier is needed (a barrier that waits for a descheduled thread costs milliseconds).
// 2. Rows go in blocks whose quantized form stays in the second-level cache.
// 3. Per group of panels, all row tiles of the block run while the group is in the nearer caches.
// 4. Each tile's sums go through the epilogue while they are in the first-level cache.

#include "int8_linear.h"

#include <vector>

#include "path.h"
#include "threads.h"

namespace tcompress::cpu {
namespace {

constexpr int64_t kBlockBytes = 128 << 10;     // quantized rows of a block: a quarter of a small L2
constexpr int64_t kRequantizeBytes = 1 << 20;  // float32 rows that wait for their scale: half of a large L2
constexpr int64_t kChunkedBlockBytes = 512
                                       << 10;  // where K goes in chunks: more rows share what a chunk of weights costs

const Int8LinearPath& path_table(Path path) {
  switch (path) {
#if defined(__x86_64__)
    case Path::kAvx2:
      return kInt8LinearAvx2;
    case Path::kAvxVnni:
      return kInt8LinearAvxVnni;
    case Path::kAvx512Vnni:
      return kInt8LinearAvx512Vnni;
    case Path::kAmx:
      return kInt8LinearAmx;
#elif defined(__aarch64__)
    case Path::kNeon:
      return kInt8LinearNeon;
#endif
    default:
      return kInt8LinearScalar;
  }
}

struct Workspace {
  uint8_t* a;    // [block_rows][a_stride]
  float* scale;  // [block_rows]
  int32_t* zero_point;
  int32_t* acc;  // [block_rows or, where K is not cut into chunks, a tile's rows][kGroup]
};

// One of the weights that share the activations.
struct Part {
  const Int8LinearArgs& args;
  Int8KernelLayout layout;
  void (*epilogue)(const EpilogueArgs&);
  int64_t first_panel;  // among the panels of all parts, each part's rounded up to whole groups
  const void* factor;
  void* y;
};

struct Plan {
  const Int8LinearPath& path;
  void (*tile)(const Int8TileArgs&);
  int64_t steps, chunk_steps, a_stride, block_rows;
  int64_t x_row_bytes, y_element_bytes;
  std::vector<Part> parts;
  bool gated;  // parts[1] is multiplied into the result of parts[0], group by group
};

void copy_row(const Int8LinearArgs& args, const Plan& plan, uint8_t flip, int64_t m, uint8_t* out) {
  const uint8_t* q = args.input.q + m * args.k;
  for (int64_t i = 0; i < args.k; ++i) out[i] = static_cast<uint8_t>(q[i] ^ flip);
  for (int64_t i = args.k; i < plan.steps * kQuad; ++i) out[i] = 0;
}

void quantize_block(const Int8LinearArgs& args, const Plan& plan, const Workspace& work, int64_t m0, int64_t rows) {
  const uint8_t flip = args.act_symmetric ? plan.path.symmetric_flip : 0;
  for (int64_t r = 0; r < rows; ++r) {
    if (args.input.q != nullptr) {
      copy_row(args, plan, flip, m0 + r, work.a + r * plan.a_stride);
      work.scale[r] = args.input.scale[m0 + r];
      work.zero_point[r] = args.act_symmetric ? flip : args.input.zero_point[m0 + r];
      continue;
    }
    const void* x = static_cast<const char*>(args.x) + (m0 + r) * plan.x_row_bytes;
    plan.path.quantize_row({x, args.x_dtype, args.k, args.act_bits, args.act_symmetric, flip,
                            work.a + r * plan.a_stride, plan.steps * kQuad, work.scale + r, work.zero_point + r,
                            args.fixed});
    if (flip != 0) work.zero_point[r] = flip;
  }
}

// The tiles of one group of panels for a block of rows.
void run_group(const Plan& plan, const Part& part, const Workspace& work, int64_t m0, int64_t rows, int64_t panel) {
  const Int8LinearArgs& args = part.args;
  const Int8KernelLayout& layout = part.layout;
  const int panels = static_cast<int>(smaller(layout.n_panels - panel, kGroupPanels));
  const int64_t n0 = panel * kPanel, columns = smaller(args.n - n0, panels * kPanel);
  const int8_t* weights = args.kernel_weight + layout.group(panel);
  const uint8_t* runs = reinterpret_cast<const uint8_t*>(args.kernel_weight + layout.schedule(panel));
  const int32_t* column_sum = reinterpret_cast<const int32_t*>(args.kernel_weight + layout.column_sums) + n0;
  const auto at = [](const void* data, int64_t offset) {
    return data == nullptr ? nullptr : static_cast<const char*>(data) + offset;
  };
  const int width = panels * kPanel;
  const auto multiply = [&](int64_t r, int64_t step, int64_t steps, int32_t* acc) {
    const int tile_rows = static_cast<int>(smaller(rows - r, plan.path.max_rows));
    plan.tile({work.a + r * plan.a_stride + step * kQuad, plan.a_stride, tile_rows, weights + step * width * kQuad,
               panels, steps, runs, acc, step > 0});
  };
  const auto finish = [&](int64_t r, int64_t count, int32_t* acc) {
    const int64_t offset = ((m0 + r) * args.n + n0) * plan.y_element_bytes;
    part.epilogue({acc, width, count, columns, work.zero_point + r, work.scale + r, column_sum, args.weight_scale + n0,
                   args.bias == nullptr ? nullptr : args.bias + n0, args.n, at(part.factor, offset),
                   at(args.residual, offset), static_cast<char*>(part.y) + offset});
  };
  if (plan.chunk_steps >= layout.steps) {
    for (int64_t r = 0; r < rows; r += plan.path.max_rows) {
      multiply(r, 0, layout.steps, work.acc);
      finish(r, smaller(rows - r, plan.path.max_rows), work.acc);
    }
    return;
  }
  for (int64_t step = 0; step < layout.steps; step += plan.chunk_steps)
    for (int64_t r = 0; r < rows; r += plan.path.max_rows)
      multiply(r, step, smaller(layout.steps - step, plan.chunk_steps), work.acc + r * width);
  finish(0, rows, work.acc);
}

void run_cell(const Plan& plan, const Workspace& work, const Cell& cell) {
  for (int64_t m0 = cell.m0; m0 < cell.m1; m0 += plan.block_rows) {
    const int64_t rows = smaller(cell.m1 - m0, plan.block_rows);
    quantize_block(plan.parts[0].args, plan, work, m0, rows);
    size_t i = 0;
    for (int64_t p = cell.p0; p < cell.p1; p += kGroupPanels) {
      if (plan.gated) {
        for (const Part& part : plan.parts) run_group(plan, part, work, m0, rows, p);
        continue;
      }
      while (i + 1 < plan.parts.size() && plan.parts[i + 1].first_panel <= p) ++i;
      run_group(plan, plan.parts[i], work, m0, rows, p - plan.parts[i].first_panel);
    }
  }
}

}  // namespace

void int8_multi_linear(const Int8LinearArgs* all, int count, bool gated, int num_threads) {
  const Int8LinearArgs& args = all[0];
  const Int8LinearPath& path = path_table(current_path());
  const int64_t steps = ceil_div(args.k, kQuad), a_stride = odd_lines(steps * kQuad);
  Plan plan{path,
            args.act_symmetric ? path.tile_signed : path.tile_unsigned,
            steps,
            path.chunk_steps > 0 && args.m > path.max_rows ? path.chunk_steps : steps,
            a_stride,
            0,
            args.k * element_bytes(args.x_dtype),
            element_bytes(args.y_dtype),
            {},
            gated};
  int64_t panels = 0, macs = 0;
  for (int i = 0; i < count; ++i) {
    const Int8LinearArgs& one = all[i];
    const bool factor = gated && i == 1;
    const Int8KernelLayout layout(one.n, one.k);
    if (layout.n_panels == 0) continue;
    plan.parts.push_back({one, layout, path.epilogue(one.activation, one.y_dtype), panels, factor ? args.y : nullptr,
                          factor ? args.y : one.y});
    if (!factor) panels += layout.n_groups * kGroupPanels;
    macs += args.m * one.n * one.k;
  }
  if (args.m == 0 || panels == 0) return;
  const int threads = useful_threads(macs, kMinMacsPerThread, num_threads);
  const Grid grid(args.m, panels, {path.row_unit, static_cast<double>(path.macs_per_cycle), 1}, threads);
  const int64_t block_bytes = path.chunk_steps > 0 ? kChunkedBlockBytes : kBlockBytes;
  const int64_t fitting_rows = block_bytes / a_stride / path.max_rows * path.max_rows;
  plan.block_rows = smaller(fitting_rows > path.max_rows ? fitting_rows : path.max_rows, grid.cell_rows());

  const int64_t acc_rows = plan.chunk_steps < steps ? plan.block_rows : path.max_rows;
  const int64_t a_bytes = plan.block_rows * a_stride, acc_bytes = acc_rows * kGroup * 4;
  const int64_t work_bytes = round_up(a_bytes + acc_bytes + plan.block_rows * 8, kCacheLine);
  uint8_t* memory = scratch(work_bytes * grid.cells());
  parallel_tasks(grid.cells(), [&](int t) {
    uint8_t* a = memory + t * work_bytes;
    float* scale = reinterpret_cast<float*>(a + a_bytes + acc_bytes);
    const Workspace work{a, scale, reinterpret_cast<int32_t*>(scale + plan.block_rows),
                         reinterpret_cast<int32_t*>(a + a_bytes)};
    const Cell cell = grid.cell(t);
    if (cell.m0 < cell.m1 && cell.p0 < cell.p1) run_cell(plan, work, cell);
  });
}

void int8_linear(const Int8LinearArgs& args, int num_threads) { int8_multi_linear(&args, 1, false, num_threads); }

void int8_linear_requantize(const Int8LinearArgs& args, const QuantizePerTokenArgs& out, int num_threads) {
  if (args.m == 0) return;
  const Int8LinearPath& path = path_table(current_path());
  // A row's scale needs the whole row: a thread computes whole rows, which it quantizes while they are in its caches.
  // Too few rows for all threads are computed together.
  const int64_t row_bytes = round_up(args.n * static_cast<int64_t>(sizeof(float)), kCacheLine);
  const int threads = useful_threads(args.m * args.n * args.k, kMinMacsPerThread, num_threads);
  const bool alone = threads == 1 || args.m < threads * path.row_unit;
  const int64_t fitting = kRequantizeBytes / (row_bytes > 0 ? row_bytes : 1) / path.max_rows * path.max_rows;
  const int64_t share = round_up(ceil_div(args.m, alone ? 1 : threads), path.row_unit);
  const int64_t block = alone ? args.m : smaller(fitting > path.max_rows ? fitting : path.max_rows, share);
  const auto run = [&](int64_t m0, int inner_threads) {
    const int64_t rows = smaller(args.m - m0, block);
    float* y = reinterpret_cast<float*>(scratch(rows * args.n * static_cast<int64_t>(sizeof(float)) + 1, 1));
    Int8LinearArgs part = args;
    part.m = rows;
    part.y = y;
    part.y_dtype = DType::kFloat32;
    if (args.input.q != nullptr)
      part.input = {args.input.q + m0 * args.k, args.input.scale + m0, args.input.zero_point + m0};
    else
      part.x = static_cast<const char*>(args.x) + m0 * args.k * element_bytes(args.x_dtype);
    int8_linear(part, inner_threads);
    for (int64_t r = 0; r < rows; ++r)
      path.quantize_row({y + r * args.n, DType::kFloat32, args.n, out.bits, out.symmetric, 0, out.q + (m0 + r) * args.n,
                         args.n, out.scale + m0 + r, out.zero_point + m0 + r});
  };
  if (alone) return run(0, num_threads);
  const int64_t blocks = ceil_div(args.m, block);
  parallel_tasks(threads, [&](int t) {
    for (int64_t i = blocks * t / threads; i < blocks * (t + 1) / threads; ++i) run(i * block, 1);
  });
}

}  // namespace tcompress::cpu
