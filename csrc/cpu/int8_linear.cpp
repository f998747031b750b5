// The table {Path -> functions}, and what all paths share: packing, the split over threads, the order of the tiles.
//
// 1. The output is cut into a grid of row and panel ranges, one cell a thread; a thread quantizes its own rows, so no
//    barrier is needed (a barrier that waits for a descheduled thread costs milliseconds).
// 2. Rows go in blocks whose quantized form stays in the second-level cache.
// 3. Per group of panels, all row tiles of the block run while the group is in the nearer caches.
// 4. Each tile's sums go through the epilogue while they are in the first-level cache.

#include "int8_linear.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "flush_schedule.h"
#include "path.h"
#include "threads.h"

namespace tcompress::cpu {
namespace {

constexpr int64_t kBlockBytes = 128 << 10;      // quantized rows of a block: a quarter of a small L2
constexpr int64_t kMinMacsPerThread = 1 << 18;  // about 5 us of work; starting a thread costs 1 to 2 us
constexpr int64_t kCacheLine = 64;
// What the split over threads weighs against multiplications (path.macs_per_cycle), measured on one core: cycles to
// quantize an element, and to bring a byte of weights from the shared cache.
constexpr double kQuantizeCycles = 0.7;
constexpr double kWeightCycles = 0.05;

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

struct Grid {
  int rows, groups;
};

// The cell counts whose largest cell costs least.
Grid choose_grid(int64_t m, int64_t n_groups, const Int8LinearPath& path, int threads) {
  Grid best{1, 1};
  double best_cost = -1;
  for (int r = 1; r <= threads; ++r) {
    const int c = threads / r;
    const double cell_rows = static_cast<double>(round_up(ceil_div(m, r), path.row_unit < m ? path.row_unit : m));
    const double cell_columns = static_cast<double>(ceil_div(n_groups, c) * kGroup);
    const double cost =
        cell_rows * cell_columns / path.macs_per_cycle + cell_rows * kQuantizeCycles + cell_columns * kWeightCycles;
    if (best_cost < 0 || cost < best_cost) {
      best_cost = cost;
      best = {r, c};
    }
  }
  return best;
}

// Grows and is kept: a fresh allocation of this size would fault in its pages at every call.
uint8_t* scratch(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> buffer;
  thread_local int64_t capacity = 0;
  if (capacity < bytes) {
    capacity = 0;
    buffer.reset(std::aligned_alloc(kCacheLine, round_up(bytes, kCacheLine)));
    if (!buffer) throw std::bad_alloc();
    capacity = bytes;
  }
  return static_cast<uint8_t*>(buffer.get());
}

// One cell of the grid: rows [m0, m1), panels [p0, p1) in whole groups.
struct Cell {
  int64_t m0, m1, p0, p1;
};

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
          char* y = static_cast<char*>(args.y) + ((m0 + r + i) * args.n + n0) * plan.y_element_bytes;
          plan.epilogue({acc + i * panels * kPanel, columns, work.zero_point[r + i], work.scale[r + i], column_sum + n0,
                         args.weight_scale + n0, args.bias == nullptr ? nullptr : args.bias + n0, y});
        }
      }
    }
  }
}

int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 || dtype == DType::kInt32 ? 4 : 2; }

}  // namespace

Int8KernelLayout::Int8KernelLayout(int64_t n, int64_t k)
    : n_panels(ceil_div(n, kPanel)), steps(ceil_div(k, kQuad)), n_groups(ceil_div(n_panels, kGroupPanels)) {
  column_sums = group(n_panels);
  schedules = column_sums + n_panels * kPanel * static_cast<int64_t>(sizeof(int32_t));
  bytes = round_up(schedules + n_groups * steps, kQuad);
}

namespace {

// Steps are written in order, so that stores are sequential and each row's loads are too.
void pack_group(const int8_t* weight, int64_t n, int64_t k, int64_t n0, int n_panels, int8_t* group,
                int32_t* column_sum) {
  const int width = n_panels * kPanel;
  const int rows = static_cast<int>(n - n0 < width ? n - n0 : width);
  const int64_t whole_steps = k / kQuad;
  const int tail = static_cast<int>(k % kQuad);
  const int8_t* w = weight + n0 * k;
  for (int64_t step = 0; step < whole_steps; ++step) {
    int8_t* out = group + step * width * kQuad;
    for (int j = 0; j < rows; ++j) std::memcpy(out + j * kQuad, w + j * k + step * kQuad, kQuad);
    std::memset(out + rows * kQuad, 0, static_cast<size_t>(width - rows) * kQuad);
  }
  if (tail != 0) {
    int8_t* out = group + whole_steps * width * kQuad;
    std::memset(out, 0, static_cast<size_t>(width) * kQuad);
    for (int j = 0; j < rows; ++j) std::memcpy(out + j * kQuad, w + j * k + whole_steps * kQuad, tail);
  }
  for (int j = 0; j < width; ++j) {
    int32_t sum = 0;
    for (int64_t i = 0; j < rows && i < k; ++i) sum += w[j * k + i];
    column_sum[j] = sum;
  }
}

}  // namespace

void int8_prepack(const int8_t* weight, int64_t n, int64_t k, int8_t* kernel_weight, int num_threads) {
  const Int8KernelLayout layout(n, k);
  int32_t* column_sum = reinterpret_cast<int32_t*>(kernel_weight + layout.column_sums);
  const int64_t used = layout.schedule(layout.n_groups * kGroupPanels);
  std::memset(kernel_weight + used, 0, static_cast<size_t>(layout.bytes - used));
  const int threads = useful_threads(n * k, kMinMacsPerThread, num_threads);
  parallel_tasks(threads, [&](int t) {
    for (int64_t g = layout.n_groups * t / threads; g < layout.n_groups * (t + 1) / threads; ++g) {
      const int64_t p = g * kGroupPanels;
      const int panels = static_cast<int>(layout.n_panels - p < kGroupPanels ? layout.n_panels - p : kGroupPanels);
      int8_t* group = kernel_weight + layout.group(p);
      uint8_t* runs = reinterpret_cast<uint8_t*>(kernel_weight + layout.schedule(p));
      pack_group(weight, n, k, p * kPanel, panels, group, column_sum + p * kPanel);
      if (panels == kGroupPanels)
        make_flush_schedule(group, layout.steps, runs);
      else
        std::memset(runs, 0, static_cast<size_t>(layout.steps));
    }
  });
}

void int8_linear(const Int8LinearArgs& args, int num_threads) {
  if (args.m == 0 || args.n == 0) return;
  const Int8LinearPath& path = path_table(current_path());
  const Int8KernelLayout layout(args.n, args.k);
  // A stride that is an odd number of cache lines: rows of a power-of-two K would all fall into the same cache sets.
  const int64_t a_stride = (round_up(layout.steps * kQuad, kCacheLine) / kCacheLine | 1) * kCacheLine;
  const int64_t fitting_rows = kBlockBytes / a_stride / path.max_rows * path.max_rows;

  const int threads = useful_threads(args.m * args.n * args.k, kMinMacsPerThread, num_threads);
  const Grid grid = choose_grid(args.m, layout.n_groups, path, threads);
  const int64_t cell_rows = round_up(ceil_div(args.m, grid.rows), path.row_unit);
  const int64_t cell_panels = ceil_div(layout.n_groups, grid.groups) * kGroupPanels;
  int64_t block_rows = fitting_rows > path.max_rows ? fitting_rows : path.max_rows;
  if (block_rows > cell_rows) block_rows = cell_rows;

  const Plan plan{path,
                  args.act_symmetric ? path.tile_signed : path.tile_unsigned,
                  path.epilogue(args.activation, args.y_dtype),
                  layout,
                  a_stride,
                  block_rows,
                  args.k * element_bytes(args.x_dtype),
                  element_bytes(args.y_dtype)};

  const int64_t work_bytes = round_up(block_rows * (a_stride + 8), kCacheLine);
  uint8_t* memory = scratch(work_bytes * grid.rows * grid.groups);
  parallel_tasks(grid.rows * grid.groups, [&](int t) {
    uint8_t* a = memory + t * work_bytes;
    float* scale = reinterpret_cast<float*>(a + block_rows * a_stride);
    const Workspace work{a, scale, reinterpret_cast<int32_t*>(scale + block_rows)};
    Cell cell{t / grid.groups * cell_rows, 0, t % grid.groups * cell_panels, 0};
    cell.m1 = cell.m0 + cell_rows < args.m ? cell.m0 + cell_rows : args.m;
    cell.p1 = cell.p0 + cell_panels < layout.n_panels ? cell.p0 + cell_panels : layout.n_panels;
    if (cell.m0 < cell.m1 && cell.p0 < cell.p1) run_cell(args, plan, work, cell);
  });
}

}  // namespace tcompress::cpu
