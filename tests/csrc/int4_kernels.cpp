// The int4 kernels against naive 64-bit loops, every buffer between guard pages. With scales of 1 a result is one
// rounding of an integer times the token's scale, and is compared bit for bit.

#include "int4_kernels.h"

#include <cmath>
#include <random>
#include <vector>

#include "guarded.h"
#include "int4_linear.h"
#include "quantize_per_token.h"

namespace cpu = tcompress::cpu;

namespace {

struct Case {
  int64_t m, n, k, group_size;
  int bits;  // 0: weight-only
  bool symmetric, half_scales, zero_points, hostile, at_end;
};

std::string describe(cpu::Path path, const Case& c) {
  return std::string(cpu::path_name(path)) + " int4 " + std::to_string(c.m) + "x" + std::to_string(c.n) + "x" +
         std::to_string(c.k) + " g" + std::to_string(c.group_size) + " a" + std::to_string(c.bits);
}

void run_case(cpu::Path path, const Case& c, int threads) {
  const std::string name = describe(path, c);
  std::mt19937 random(static_cast<unsigned>(c.m * 31 + c.n * 7 + c.k));
  const int64_t row_bytes = (c.k + 1) / 2, groups = (c.k + c.group_size - 1) / c.group_size;
  const int64_t scale_bytes = c.half_scales ? 2 : 4;
  const cpu::DType scale_dtype = c.half_scales ? cpu::DType::kFloat16 : cpu::DType::kFloat32;
  const cpu::Int4KernelLayout layout(c.n, c.k, c.group_size, scale_dtype, c.zero_points);
  Guarded<uint8_t> weight(c.n * row_bytes, c.at_end), zeros(c.n * groups, c.at_end), back(c.n * row_bytes, c.at_end);
  Guarded<uint8_t> scale(c.n * groups * scale_bytes, c.at_end), scale_back(c.n * groups * scale_bytes, c.at_end);
  Guarded<uint8_t> zeros_back(c.n * groups, c.at_end), q(c.m * c.k, c.at_end);
  Guarded<int8_t> packed(layout.bytes, c.at_end);
  Guarded<float> x(c.m * c.k, c.at_end), y(c.m * c.n, c.at_end), bias(c.n, c.at_end), token_scale(c.m, c.at_end);
  Guarded<int32_t> zero_point(c.m, c.at_end);

  const auto nibble = [&](int64_t n, int64_t k) {
    const int byte = weight[n * row_bytes + k / 2];
    return k % 2 == 0 ? byte & 15 : byte >> 4;
  };
  for (int64_t i = 0; i < weight.size(); ++i) weight[i] = c.hostile ? 0xff : static_cast<uint8_t>(random());
  if (c.k % 2 != 0)
    for (int64_t n = 0; n < c.n; ++n) weight[n * row_bytes + row_bytes - 1] &= 15;
  for (int64_t i = 0; i < zeros.size(); ++i) zeros[i] = static_cast<uint8_t>(c.hostile ? i % 2 * 15 : random() % 16);
  for (int64_t i = 0; i < c.n * groups; ++i) {
    const float one = 1.f;
    const uint16_t half_one = 0x3c00;
    std::memcpy(scale.data() + i * scale_bytes, c.half_scales ? static_cast<const void*>(&half_one) : &one,
                static_cast<size_t>(scale_bytes));
  }
  for (int64_t i = 0; i < x.size(); ++i)
    x[i] = c.hostile ? (random() % 2 == 0 ? 1.f : -1.f) : std::normal_distribution<float>()(random);
  for (int64_t i = 0; i < c.n; ++i) bias[i] = 0.f;

  const uint8_t* zero_data = c.zero_points ? zeros.data() : nullptr;
  cpu::int4_prepack({weight.data(), c.n, c.k, c.group_size, scale.data(), scale_dtype, zero_data}, packed.data(),
                    threads);
  cpu::int4_unpack({packed.data(), c.n, c.k, c.group_size, scale_dtype, c.zero_points, back.data(), scale_back.data(),
                    zeros_back.data()},
                   threads);
  check(std::memcmp(back.data(), weight.data(), static_cast<size_t>(weight.size())) == 0, name + " unpack");
  check(std::memcmp(scale_back.data(), scale.data(), static_cast<size_t>(scale.size())) == 0, name + " unpack scale");
  if (c.zero_points)
    check(std::memcmp(zeros_back.data(), zeros.data(), static_cast<size_t>(zeros.size())) == 0, name + " unpack zero");

  cpu::Int4LinearArgs args{
      x.data(),    cpu::DType::kFloat32, c.m,         c.n,    c.k,         c.group_size,           packed.data(),
      scale_dtype, c.zero_points,        bias.data(), c.bits, c.symmetric, cpu::Activation::kNone, nullptr,
      y.data(),    cpu::DType::kFloat32};
  cpu::int4_linear(args, threads);
  if (c.bits != 0)
    cpu::quantize_per_token({x.data(), cpu::DType::kFloat32, c.m, c.k, c.bits, c.symmetric, q.data(),
                             token_scale.data(), zero_point.data()},
                            1);
  for (int64_t m = 0; m < c.m; ++m)
    for (int64_t n = 0; n < c.n; ++n) {
      int64_t sum = 0;
      double real = 0, size = 0;
      for (int64_t k = 0; k < c.k; ++k) {
        const int w = nibble(n, k) - (c.zero_points ? zeros[n * groups + k / c.group_size] : cpu::kSymmetricZero);
        if (c.bits == 0) {
          real += static_cast<double>(x[m * c.k + k]) * w;
          size += std::fabs(static_cast<double>(x[m * c.k + k]) * w);
        } else {
          const int a = c.symmetric ? static_cast<int8_t>(q[m * c.k + k]) : q[m * c.k + k];
          sum += static_cast<int64_t>(a - zero_point[m]) * w;
        }
      }
      const float got = y[m * c.n + n];
      if (c.bits == 0)
        check(std::fabs(got - real) <= 1e-6 * size + 1e-30, name + " floats");
      else
        check(got == static_cast<float>(sum) * token_scale[m], name + " integers");
    }

  // A packed weight that holds anything: the result means nothing, but no page is touched.
  for (int fill : {0, 255, 256}) {
    for (int64_t i = 0; i < layout.bytes; ++i) packed[i] = static_cast<int8_t>(fill < 256 ? fill : random());
    cpu::int4_linear(args, threads);
  }
}

}  // namespace

void run_int4(cpu::Path path, bool few) {
  using Sizes = std::vector<int64_t>;
  const Sizes rows = few ? Sizes{1, 5} : Sizes{1, 2, 4, 5, 8, 9, 16, 17, 33};
  const Sizes columns = few ? Sizes{33, 49} : Sizes{1, 16, 47, 48, 97};
  const Sizes depths = few ? Sizes{1, 70} : Sizes{0, 1, 31, 33, 64, 130};
  int turn = 0;  // the other settings take turns: all of their combinations would take minutes
  for (int64_t m : rows)
    for (int64_t n : columns)
      for (int64_t k : depths)
        for (int bits : {8, 7, 0}) {
          constexpr int64_t kGroups[] = {32, 64, 128, 1 << 20};
          ++turn;
          run_case(
              path,
              {m, n, k, kGroups[turn % 4], bits, bits != 7, turn % 3 == 0, turn % 5 < 2, turn % 7 == 0, turn % 2 == 0},
              1);
        }
  if (few) return;
  for (bool zero_points : {true, false}) {
    run_case(path, {70, 97, 1100, 128, 8, true, true, zero_points, true, true}, 2);  // chunks of K, two threads
    run_case(path, {1, 1000, 600, 32, 7, false, true, zero_points, true, true}, 2);  // outputs split over threads
    run_case(path, {40, 50, 1030, 1 << 20, 0, true, false, zero_points, false, true}, 2);
  }
}
