// The table {Path -> functions} and the order of the work, as in int8_linear.cpp: cells of the output, blocks of rows,
// groups of panels. A few rows multiply straight from the packed weights, which are then read once; more rows unpack a
// chunk of a group into the first-level cache and pass over it.

#include "int4_linear.h"

#include <cstring>
#include <utility>
#include <vector>

#include "path.h"
#include "threads.h"

namespace tcompress::cpu {
namespace {

constexpr int64_t kBlockBytes = 256 << 10;  // prepared rows of a block: half of a small L2
constexpr int64_t kChunkSteps = 128;        // 128 * 192 bytes = 24 KB of unpacked weights
constexpr int64_t kFloatChunkSteps = 32;    // the same in float32
constexpr int64_t kTileDepth = 16;          // steps that a path may read past the last

const Int4LinearPath& path_table(Path path) {
  switch (path) {
#if defined(__x86_64__)
    case Path::kAvx2:
    case Path::kAvxVnni:
      return kInt4LinearAvx2;
    case Path::kAvx512Vnni:
      return kInt4LinearAvx512Vnni;
    case Path::kAmx:
      return kInt4LinearAmx;
#endif
    default:
      return kInt4LinearScalar;
  }
}

// ---- one call ---------------------------------------------------------------------------------------------------

struct Workspace {
  uint8_t* a;  // [block_rows][a_stride]
  float* scale;
  int32_t* corrections;  // [block_rows][n_spans]
  float* acc;            // [block_rows][kGroup]
  void* unpacked;
};

// One of the weights that share the activations.
struct Part {
  const Int4LinearArgs& args;
  Int4KernelLayout layout;
  Int4Tile packed, unpacked;
  void (*epilogue)(const FloatEpilogueArgs&);
  int64_t first_panel;  // among the panels of all parts, each part's rounded up to whole groups
  const void* factor;
  void* y;
};

struct Plan {
  const Int4LinearPath& path;
  void (*unpack)(const Int4ChunkArgs&);
  int64_t steps, a_stride, block_rows;
  int64_t chunk_steps, span_steps, n_spans;
  int64_t a_step_bytes;  // of one row
  int64_t weight_bytes;  // of one step of one output, unpacked
  int64_t x_row_bytes, y_element_bytes;
  std::vector<Part> parts;
  bool gated;  // parts[1] is multiplied into the result of parts[0], group by group
};

void prepare_rows(const Int4LinearArgs& args, const Plan& plan, const Workspace& work, int64_t m0, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    const void* x = static_cast<const char*>(args.x) + (m0 + r) * plan.x_row_bytes;
    uint8_t* a = work.a + r * plan.a_stride;
    if (args.act_bits == 0) {
      work.scale[r] = 1.f;
      float* f = reinterpret_cast<float*>(a);
      plan.path.to_float(x, args.x_dtype, args.k, f);
      for (int64_t i = args.k; i < plan.steps * kQuad; ++i) f[i] = 0.f;
      continue;
    }
    int32_t zero_point = 0;
    plan.path.quantize_row(
        {x, args.x_dtype, args.k, args.act_bits, args.act_symmetric, 0, a, plan.a_stride, work.scale + r, &zero_point});
    for (int64_t i = 0; i < args.k && zero_point != 0; ++i) a[i] = static_cast<uint8_t>(a[i] - zero_point);
    plan.path.corrections(reinterpret_cast<const int8_t*>(a), plan.steps, plan.span_steps, args.has_zero_points,
                          work.corrections + r * plan.n_spans);
  }
}

void multiply_group(const Plan& plan, const Part& part, const Workspace& work, int64_t rows, int64_t panel,
                    int n_panels) {
  const Int4LinearArgs& args = part.args;
  const Int4KernelLayout& layout = part.layout;
  const int width = n_panels * kPanel;
  const bool packed = rows <= plan.path.max_packed_rows;
  const int64_t chunk = packed ? layout.steps : plan.chunk_steps;
  const uint8_t* weights = reinterpret_cast<const uint8_t*>(args.kernel_weight + layout.weights_at(panel));
  const char* scales = reinterpret_cast<const char*>(args.kernel_weight + layout.scales_at(panel));
  const uint8_t* zero_points = reinterpret_cast<const uint8_t*>(args.kernel_weight + layout.zero_points_at(panel));
  std::memset(work.acc, 0, static_cast<size_t>(rows * width) * sizeof(float));
  for (int64_t step = 0; step < layout.steps; step += chunk) {
    const int64_t steps = smaller(layout.steps - step, chunk);
    const int64_t k_group = step / layout.group_steps;
    const uint8_t* chunk_weights = weights + step * width * kQuad / 2;
    const uint8_t* chunk_zeros = args.has_zero_points ? zero_points + k_group * width : nullptr;
    if (!packed) plan.unpack({chunk_weights, n_panels, steps, layout.group_steps, chunk_zeros, work.unpacked});
    const int max_rows = packed ? plan.path.max_packed_rows : plan.path.max_rows;
    for (int64_t r = 0; r < rows; r += max_rows)
      (packed ? part.packed
              : part.unpacked)({work.a + r * plan.a_stride + step * plan.a_step_bytes, plan.a_stride,
                                static_cast<int>(smaller(rows - r, max_rows)), packed ? chunk_weights : work.unpacked,
                                n_panels, steps, plan.span_steps, ceil_div(layout.group_steps, plan.span_steps),
                                work.corrections + r * plan.n_spans + step / plan.span_steps, plan.n_spans,
                                scales + k_group * width * layout.scale_bytes, chunk_zeros, work.acc + r * width});
  }
}

void run_group(const Plan& plan, const Part& part, const Workspace& work, int64_t m0, int64_t rows, int64_t panel) {
  const Int4LinearArgs& args = part.args;
  const int panels = static_cast<int>(smaller(part.layout.n_panels - panel, kGroupPanels));
  const int64_t n0 = panel * kPanel, columns = smaller(args.n - n0, panels * kPanel);
  const auto at = [](const void* data, int64_t offset) {
    return data == nullptr ? nullptr : static_cast<const char*>(data) + offset;
  };
  multiply_group(plan, part, work, rows, panel, panels);
  const int64_t offset = (m0 * args.n + n0) * plan.y_element_bytes;
  part.epilogue({work.acc, panels * kPanel, rows, columns, work.scale, args.bias == nullptr ? nullptr : args.bias + n0,
                 args.n, at(part.factor, offset), at(args.residual, offset), static_cast<char*>(part.y) + offset});
}

void run_cell(const Plan& plan, const Workspace& work, const Cell& cell) {
  for (int64_t m0 = cell.m0; m0 < cell.m1; m0 += plan.block_rows) {
    const int64_t rows = smaller(cell.m1 - m0, plan.block_rows);
    prepare_rows(plan.parts[0].args, plan, work, m0, rows);
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

void int4_multi_linear(const Int4LinearArgs* all, int count, bool gated, int num_threads) {
  const Int4LinearArgs& args = all[0];
  const Int4LinearPath& path = path_table(current_path());
  const bool floats = args.act_bits == 0;
  std::vector<Part> parts;
  int64_t panels = 0, macs = 0;
  for (int i = 0; i < count; ++i) {
    const Int4LinearArgs& one = all[i];
    const bool factor = gated && i == 1;
    const int half = one.scale_dtype == DType::kFloat16;
    const Int4KernelLayout layout(one.n, one.k, one.group_size, one.scale_dtype, one.has_zero_points);
    if (layout.n_panels == 0) continue;
    parts.push_back({one, layout, floats ? path.float_packed[half] : path.packed[half],
                     floats ? path.float_unpacked[half] : path.unpacked[half],
                     path.epilogue(one.activation, one.y_dtype), panels, factor ? args.y : nullptr,
                     factor ? args.y : one.y});
    if (!factor) panels += round_up(layout.n_panels, kGroupPanels);
    macs += args.m * one.n * one.k;
  }
  if (args.m == 0 || panels == 0) return;

  const Int4KernelLayout& layout = parts[0].layout;
  const int64_t a_element_bytes = floats ? sizeof(float) : 1;
  const int64_t a_stride = odd_lines(layout.steps * kQuad * a_element_bytes);
  const int64_t chunk_steps = floats ? kFloatChunkSteps : kChunkSteps;
  const int64_t span_steps =
      smaller(smaller(floats ? kFloatChunkSteps : path.max_span_steps, layout.group_steps), chunk_steps);
  const int threads = useful_threads(macs, kMinMacsPerThread, num_threads);
  const Grid grid(args.m, panels, {path.row_unit, floats ? path.float_macs_per_cycle : path.macs_per_cycle, 0.5},
                  threads);
  const int64_t fitting_rows = kBlockBytes / a_stride / path.max_rows * path.max_rows;
  const int64_t block_rows = smaller(fitting_rows > path.max_rows ? fitting_rows : path.max_rows, grid.cell_rows());
  const Plan plan{path,
                  floats ? path.float_unpack : path.unpack,
                  layout.steps,
                  a_stride,
                  block_rows,
                  chunk_steps,
                  span_steps,
                  ceil_div(layout.steps, span_steps),
                  kQuad * a_element_bytes,
                  kQuad * a_element_bytes,
                  args.k * element_bytes(args.x_dtype),
                  element_bytes(args.y_dtype),
                  std::move(parts),
                  gated};

  // Each part of a thread's memory starts at a cache line.
  int64_t size = 0;
  const auto reserve = [&size](int64_t bytes) {
    const int64_t at = size;
    size += round_up(bytes, kCacheLine);
    return at;
  };
  const int64_t at_a = reserve(block_rows * a_stride);
  const int64_t at_scale = reserve(block_rows * static_cast<int64_t>(sizeof(float)));
  const int64_t at_corrections = reserve(block_rows * plan.n_spans * static_cast<int64_t>(sizeof(int32_t)));
  const int64_t at_acc = reserve(block_rows * kGroup * static_cast<int64_t>(sizeof(float)));
  const int64_t at_unpacked =
      reserve(round_up(smaller(chunk_steps, plan.steps), kTileDepth) * kGroup * plan.weight_bytes);
  uint8_t* memory = scratch(size * grid.cells());
  parallel_tasks(grid.cells(), [&](int t) {
    const Cell cell = grid.cell(t);
    if (cell.m0 >= cell.m1 || cell.p0 >= cell.p1) return;
    uint8_t* own = memory + t * size;
    run_cell(plan,
             {own + at_a, reinterpret_cast<float*>(own + at_scale), reinterpret_cast<int32_t*>(own + at_corrections),
              reinterpret_cast<float*>(own + at_acc), own + at_unpacked},
             cell);
  });
}

void int4_linear(const Int4LinearArgs& args, int num_threads) { int4_multi_linear(&args, 1, false, num_threads); }

}  // namespace tcompress::cpu
