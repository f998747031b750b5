// Between the storage layout of an int4 weight and the kernel layout drawn in int4_linear.h.

#include <cstring>

#include "int4_linear.h"
#include "threads.h"

namespace tcompress::cpu {
namespace {

constexpr int kPairK = 2 * kQuad;  // k's of a 32-bit word: a pair of steps

// Eight consecutive k's, low nibble first, to the order of the kernel layout …
uint32_t to_kernel_order(uint32_t w) {
  const uint32_t even = w & 0x0f0f0f0fu, odd = (w >> 4) & 0x0f0f0f0fu;  // k0 k2 k4 k6 and k1 k3 k5 k7
  const auto interleave = [](uint32_t e, uint32_t o) {                  // two bytes each: e0 o0 e1 o1
    return (e & 0xffu) | (o & 0xffu) << 8 | (e >> 8 & 0xffu) << 16 | (o >> 8 & 0xffu) << 24;
  };
  return interleave(even, odd) | interleave(even >> 16, odd >> 16) << 4;
}

// … and back.
uint32_t to_storage_order(uint32_t w) {
  const auto squeeze = [](uint32_t four) {  // four nibbles in four bytes to 16 bits
    return (four & 0xfu) | (four >> 4 & 0xf0u) | (four >> 8 & 0xf00u) | (four >> 12 & 0xf000u);
  };
  return squeeze(w & 0x0f0f0f0fu) | squeeze((w >> 4) & 0x0f0f0f0fu) << 16;
}

// What of the eight k's from k0 on lies within k.
uint32_t inside(uint32_t w, int64_t k0, int64_t k) {
  const int64_t count = k - k0;
  return count >= kPairK ? w : (count <= 0 ? 0 : w & ((1u << (4 * count)) - 1));
}

void pack_weights(const Int4PrepackArgs& args, int64_t n0, int width, int64_t steps, uint8_t* out) {
  const int64_t row_bytes = ceil_div(args.k, 2);
  for (int64_t i = 0; i < steps / 2; ++i) {
    const int64_t left = smaller(row_bytes - i * kQuad, kQuad);
    for (int j = 0; j < width; ++j) {
      uint32_t w = 0;
      if (n0 + j < args.n && left > 0)
        std::memcpy(&w, args.weight + (n0 + j) * row_bytes + i * kQuad, static_cast<size_t>(left));
      w = to_kernel_order(inside(w, i * kPairK, args.k));
      std::memcpy(out + (i * width + j) * kQuad, &w, kQuad);
    }
  }
}

void unpack_weights(const Int4UnpackArgs& args, int64_t n0, int width, const uint8_t* in) {
  const int64_t row_bytes = ceil_div(args.k, 2);
  for (int64_t i = 0; i * kQuad < row_bytes; ++i) {
    const int64_t left = smaller(row_bytes - i * kQuad, kQuad);
    for (int j = 0; j < width && n0 + j < args.n; ++j) {
      uint32_t w;
      std::memcpy(&w, in + (i * width + j) * kQuad, kQuad);
      w = inside(to_storage_order(w), i * kPairK, args.k);
      std::memcpy(args.weight + (n0 + j) * row_bytes + i * kQuad, &w, static_cast<size_t>(left));
    }
  }
}

// [N, groups] -> [groups][width], zero padded
template <class T>
void pack_groups(const void* in, int64_t n, int64_t n_k_groups, int64_t n0, int width, void* out) {
  for (int64_t g = 0; g < n_k_groups; ++g)
    for (int j = 0; j < width; ++j)
      static_cast<T*>(out)[g * width + j] = n0 + j < n ? static_cast<const T*>(in)[(n0 + j) * n_k_groups + g] : T{};
}

template <class T>
void unpack_groups(const void* in, int64_t n, int64_t n_k_groups, int64_t n0, int width, void* out) {
  for (int64_t g = 0; g < n_k_groups; ++g)
    for (int j = 0; j < width && n0 + j < n; ++j)
      static_cast<T*>(out)[(n0 + j) * n_k_groups + g] = static_cast<const T*>(in)[g * width + j];
}

// Calls f(first panel, first output, outputs) for every group, on threads.
template <class F>
void for_each_group(const Int4KernelLayout& layout, int64_t macs, int num_threads, const F& f) {
  const int64_t n_groups = ceil_div(layout.n_panels, kGroupPanels);
  const int threads = useful_threads(macs, kMinMacsPerThread, num_threads);
  parallel_tasks(threads, [&](int t) {
    for (int64_t g = n_groups * t / threads; g < n_groups * (t + 1) / threads; ++g) {
      const int64_t p = g * kGroupPanels;
      f(p, p * kPanel, static_cast<int>(smaller(layout.n_panels - p, kGroupPanels)) * kPanel);
    }
  });
}

}  // namespace

Int4KernelLayout::Int4KernelLayout(int64_t n, int64_t k, int64_t group_size, DType scale_dtype, bool has_zero_points)
    : n_panels(ceil_div(n, kPanel)), steps(round_up(k, kInt4PadK) / kQuad), scale_bytes(element_bytes(scale_dtype)) {
  n_k_groups = ceil_div(k, group_size);
  group_steps = n_k_groups > 1 ? group_size / kQuad : (steps > 0 ? steps : 1);
  scales = weights_at(n_panels);
  zero_points = scales_at(n_panels);
  bytes = has_zero_points ? zero_points_at(n_panels) : zero_points;
}

void int4_prepack(const Int4PrepackArgs& args, int8_t* kernel_weight, int num_threads) {
  const Int4KernelLayout layout(args.n, args.k, args.group_size, args.scale_dtype, args.zero_point != nullptr);
  for_each_group(layout, args.n * args.k, num_threads, [&](int64_t p, int64_t n0, int width) {
    pack_weights(args, n0, width, layout.steps, reinterpret_cast<uint8_t*>(kernel_weight + layout.weights_at(p)));
    const auto pack = args.scale_dtype == DType::kFloat32 ? pack_groups<uint32_t> : pack_groups<uint16_t>;
    pack(args.scale, args.n, layout.n_k_groups, n0, width, kernel_weight + layout.scales_at(p));
    if (args.zero_point != nullptr)
      pack_groups<uint8_t>(args.zero_point, args.n, layout.n_k_groups, n0, width,
                           kernel_weight + layout.zero_points_at(p));
  });
}

void int4_unpack(const Int4UnpackArgs& args, int num_threads) {
  const Int4KernelLayout layout(args.n, args.k, args.group_size, args.scale_dtype, args.has_zero_points);
  for_each_group(layout, args.n * args.k, num_threads, [&](int64_t p, int64_t n0, int width) {
    const int8_t* in = args.kernel_weight;
    unpack_weights(args, n0, width, reinterpret_cast<const uint8_t*>(in + layout.weights_at(p)));
    const auto unpack = args.scale_dtype == DType::kFloat32 ? unpack_groups<uint32_t> : unpack_groups<uint16_t>;
    unpack(in + layout.scales_at(p), args.n, layout.n_k_groups, n0, width, args.scale);
    if (args.has_zero_points)
      unpack_groups<uint8_t>(in + layout.zero_points_at(p), args.n, layout.n_k_groups, n0, width, args.zero_point);
  });
}

}  // namespace tcompress::cpu
