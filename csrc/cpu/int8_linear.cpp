// The table {Path -> functions}, and what all paths share: packing, the split over threads, the order of the tiles.
//
// 1. The output is cut into a grid of row and panel ranges, one cell a thread; a thread quantizes its own rows, so no
//    barrier is needed (a barrier that waits for a descheduled thread costs milliseconds).
// 2. Rows go in blocks whose quantized form stays in the second-level cache.
// 3. Per group of panels, all row tiles of the block run while the group is in the nearer caches.
// 4. Each tile's sums go through the epilogue while they are in the first-level cache.

#include "int8_linear.h"

#include "path.h"
#include "threads.h"

namespace tcompress::cpu {
namespace {

constexpr int64_t kBlockBytes = 128 << 10;      // quantized rows of a block: a quarter of a small L2

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
};

struct Plan {
  const Int8LinearPath& path;
  void (*tile)(const Int8TileArgs&);
  void (*epilogue)(const EpilogueArgs&);
  Int8KernelLayout layout;
  int64_t a_stride, block_rows;
  int64_t x_row_bytes, y_element_bytes;
};

void quantize_block(const Int8LinearArgs& args, const Plan& plan, const Workspace& work, int64_t m0, int64_t rows) {
  const uint8_t flip = args.act_symmetric ? plan.path.symmetric_flip : 0;
  for (int64_t r = 0; r < rows; ++r) {
    const void* x = static_cast<const char*>(args.x) + (m0 + r) * plan.x_row_bytes;
    plan.path.quantize_row({x, args.x_dtype, args.k, args.act_bits, args.act_symmetric, flip,
                            work.a + r * plan.a_stride, plan.layout.steps * kQuad, work.scale + r,
                            work.zero_point + r});
    if (flip != 0) work.zero_point[r] = flip;
  }
}

void run_cell(const Int8LinearArgs& args, const Plan& plan, const Workspace& work, const Cell& cell) {
  alignas(kCacheLine) int32_t acc[kMaxTileRows * kGroup];
  const Int8KernelLayout& layout = plan.layout;
  const int32_t* column_sum = reinterpret_cast<const int32_t*>(args.kernel_weight + layout.column_sums);
  for (int64_t m0 = cell.m0; m0 < cell.m1; m0 += plan.block_rows) {
    const int64_t rows = cell.m1 - m0 < plan.block_rows ? cell.m1 - m0 : plan.block_rows;
    quantize_block(args, plan, work, m0, rows);
    for (int64_t p = cell.p0; p < cell.p1; p += kGroupPanels) {
      const int panels = static_cast<int>(cell.p1 - p < kGroupPanels ? cell.p1 - p : kGroupPanels);
      const int8_t* weights = args.kernel_weight + layout.group(p);
      const uint8_t* runs = reinterpret_cast<const uint8_t*>(args.kernel_weight + layout.schedule(p));
      const int64_t n0 = p * kPanel;
      const int64_t columns = args.n - n0 < panels * kPanel ? args.n - n0 : panels * kPanel;
      for (int64_t r = 0; r < rows; r += plan.path.max_rows) {
        const int tile_rows = static_cast<int>(rows - r < plan.path.max_rows ? rows - r : plan.path.max_rows);
        plan.tile({work.a + r * plan.a_stride, plan.a_stride, tile_rows, weights, panels, layout.steps, runs, acc});
        for (int i = 0; i < tile_rows; ++i) {
          const int64_t at = ((m0 + r + i) * args.n + n0) * plan.y_element_bytes;
          char* y = static_cast<char*>(args.y) + at;
          plan.epilogue({acc + i * panels * kPanel, columns, work.zero_point[r + i], work.scale[r + i], column_sum + n0,
                         args.weight_scale + n0, args.bias == nullptr ? nullptr : args.bias + n0,
                         nullptr, args.residual == nullptr ? nullptr : static_cast<const char*>(args.residual) + at, y});
        }
      }
    }
  }
}

}  // namespace

void int8_linear(const Int8LinearArgs& args, int num_threads) {
  if (args.m == 0 || args.n == 0) return;
  const Int8LinearPath& path = path_table(current_path());
  const Int8KernelLayout layout(args.n, args.k);
  const int64_t a_stride = odd_lines(layout.steps * kQuad);
  const int64_t fitting_rows = kBlockBytes / a_stride / path.max_rows * path.max_rows;

  const int threads = useful_threads(args.m * args.n * args.k, kMinMacsPerThread, num_threads);
  const Grid grid(args.m, layout.n_panels, {path.row_unit, static_cast<double>(path.macs_per_cycle), 1}, threads);
  int64_t block_rows = fitting_rows > path.max_rows ? fitting_rows : path.max_rows;
  if (block_rows > grid.cell_rows()) block_rows = grid.cell_rows();

  const Plan plan{path,
                  args.act_symmetric ? path.tile_signed : path.tile_unsigned,
                  path.epilogue(args.activation, args.y_dtype),
                  layout,
                  a_stride,
                  block_rows,
                  args.k * element_bytes(args.x_dtype),
                  element_bytes(args.y_dtype)};

  const int64_t work_bytes = round_up(block_rows * (a_stride + 8), kCacheLine);
  uint8_t* memory = scratch(work_bytes * grid.cells());
  parallel_tasks(grid.cells(), [&](int t) {
    uint8_t* a = memory + t * work_bytes;
    float* scale = reinterpret_cast<float*>(a + block_rows * a_stride);
    const Workspace work{a, scale, reinterpret_cast<int32_t*>(scale + block_rows)};
    const Cell cell = grid.cell(t);
    if (cell.m0 < cell.m1 && cell.p0 < cell.p1) run_cell(args, plan, work, cell);
  });
}

}  // namespace tcompress::cpu
