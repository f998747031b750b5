// Between the storage layout of an int8 weight, [N, K], and the kernel layout drawn in int8_linear.h.

#include <cstring>

#include "flush_schedule.h"
#include "int8_linear.h"
#include "threads.h"

namespace tcompress::cpu {
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

// A row's quads are one step of its group apart.
void unpack_row(const Int8KernelLayout& layout, const int8_t* kernel_weight, int64_t n, int64_t k, int8_t* out) {
  const int64_t panel = n / kPanel, first = panel / kGroupPanels * kGroupPanels;
  const int64_t width = smaller(layout.n_panels - first, kGroupPanels) * kPanel;
  const int8_t* in = kernel_weight + layout.group(first) + (n - first * kPanel) * kQuad;
  for (int64_t step = 0; step < k / kQuad; ++step) std::memcpy(out + step * kQuad, in + step * width * kQuad, kQuad);
  const int64_t whole = k / kQuad * kQuad;
  if (whole < k) std::memcpy(out + whole, in + whole * width, static_cast<size_t>(k - whole));
}

}  // namespace

Int8KernelLayout::Int8KernelLayout(int64_t n, int64_t k)
    : n_panels(ceil_div(n, kPanel)), steps(ceil_div(k, kQuad)), n_groups(ceil_div(n_panels, kGroupPanels)) {
  column_sums = group(n_panels);
  schedules = column_sums + n_panels * kPanel * static_cast<int64_t>(sizeof(int32_t));
  bytes = round_up(schedules + n_groups * steps, kQuad);
}

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

void int8_unpack(const int8_t* kernel_weight, int64_t n, int64_t k, const int64_t* rows, int64_t n_rows, int8_t* weight,
                 int num_threads) {
  const Int8KernelLayout layout(n, k);
  const int threads = useful_threads(n_rows * k, kMinMacsPerThread, num_threads);
  parallel_tasks(threads, [&](int t) {
    for (int64_t i = n_rows * t / threads; i < n_rows * (t + 1) / threads; ++i)
      unpack_row(layout, kernel_weight, rows == nullptr ? i : rows[i], k, weight + i * k);
  });
}

}  // namespace tcompress::cpu
