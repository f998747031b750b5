// The torch-free kernels against naive 64-bit loops, every buffer between two pages that may not be touched.
// What is defined bit for bit is compared with the portable path's bits.
//
//   kernels_test [--few] [path ...]    --few: a tenth of the shapes, for emulators; paths: all usable ones by default
//
// Prints the first failures; exits with 1 after any.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "attention_kernels.h"
#include "guarded.h"
#include "int4_kernels.h"
#include "int4_sparse_kernels.h"
#include "int8_linear.h"
#include "path.h"
#include "quantize_per_token.h"
#include "sparse_kernels.h"
#include "two_four_kernels.h"

namespace cpu = tcompress::cpu;

namespace {

enum class Fill { kNormal, kSmallWeights, kExtreme, kZero, kOutlier };  // small weights: 16-bit sums (AVX2)

float value(Fill fill, std::mt19937& random, int64_t i) {
  switch (fill) {
    case Fill::kNormal:
    case Fill::kSmallWeights:
      return std::normal_distribution<float>()(random);
    case Fill::kExtreme:
      return i % 2 == 0 ? 1.f : -1.f;  // every activation at a bound
    case Fill::kZero:
      return 0.f;
    case Fill::kOutlier:
      return i % 97 == 0 ? 1e30f : 1.f;
  }
  return 0.f;
}

void run_case(cpu::Path path, int64_t m, int64_t n, int64_t k, bool symmetric, Fill fill, bool at_end, int threads) {
  std::mt19937 random(static_cast<unsigned>(m * 1000003 + n * 1009 + k));
  const int bits = symmetric ? 8 : 7;
  Guarded<float> x(m * k, at_end), scale(m, at_end), weight_scale(n, at_end), bias(n, at_end), y(m * n, at_end);
  Guarded<int8_t> weight(n * k, at_end), packed(cpu::Int8KernelLayout(n, k).bytes, at_end);
  Guarded<uint8_t> q(m * k, at_end);
  Guarded<int32_t> zero_point(m, at_end), sums(m * n, at_end);
  for (int64_t i = 0; i < m * k; ++i) x[i] = value(fill, random, i);
  for (int64_t i = 0; i < n * k; ++i)
    weight[i] = fill == Fill::kExtreme        ? static_cast<int8_t>(i % 5 == 4 ? 127 : -128)
                : fill == Fill::kSmallWeights ? static_cast<int8_t>(static_cast<int>(random() % 21) - 10)
                                              : static_cast<int8_t>(static_cast<int>(random() % 256) - 128);
  for (int64_t i = 0; i < n; ++i)
    weight_scale[i] = 0.01f * static_cast<float>(i % 7 + 1), bias[i] = static_cast<float>(i % 3) - 1.f;

  cpu::force_path(cpu::path_name(path));
  cpu::quantize_per_token(
      {x.data(), cpu::DType::kFloat32, m, k, bits, symmetric, q.data(), scale.data(), zero_point.data()}, threads);
  cpu::int8_prepack(weight.data(), n, k, packed.data(), threads);
  Guarded<int8_t> back(n * k, at_end), two_rows(2 * k, at_end);
  const int64_t last_and_first[] = {n - 1, 0};
  cpu::int8_unpack(packed.data(), n, k, nullptr, n, back.data(), threads);
  cpu::int8_unpack(packed.data(), n, k, last_and_first, 2, two_rows.data(), threads);
  check(std::memcmp(back.data(), weight.data(), n * k) == 0, "unpack");
  check(std::memcmp(two_rows.data(), weight.data() + (n - 1) * k, k) == 0, "unpack of the last row");
  check(std::memcmp(two_rows.data() + k, weight.data(), k) == 0, "unpack of the first row");
  cpu::Int8LinearArgs args{x.data(),
                           cpu::DType::kFloat32,
                           m,
                           n,
                           k,
                           packed.data(),
                           weight_scale.data(),
                           bias.data(),
                           bits,
                           symmetric,
                           cpu::Activation::kNone,
                           nullptr,
                           sums.data(),
                           cpu::DType::kInt32};
  cpu::int8_linear(args, threads);
  args.y = y.data();
  args.y_dtype = cpu::DType::kFloat32;
  cpu::int8_linear(args, threads);

  const std::string name = std::string(cpu::path_name(path)) + " " + std::to_string(m) + "x" + std::to_string(n) + "x" +
                           std::to_string(k) + (symmetric ? " s8" : " u7");
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      int64_t sum = 0;
      for (int64_t p = 0; p < k; ++p) {
        const int64_t a = symmetric ? static_cast<int8_t>(q[i * k + p]) : q[i * k + p];
        sum += (a - zero_point[i]) * weight[j * k + p];
      }
      check(sums[i * n + j] == sum, name + " sum");
      const float expected = static_cast<float>(static_cast<int32_t>(sum)) * scale[i] * weight_scale[j] + bias[j];
      check(y[i * n + j] == expected, name + " output");
    }
    for (int64_t p = 0; p < k; ++p) {
      const double a = symmetric ? static_cast<int8_t>(q[i * k + p]) : q[i * k + p];
      const double back = (a - zero_point[i]) * static_cast<double>(scale[i]);
      check(std::fabs(back - x[i * k + p]) <= 1.001 * scale[i], name + " quantized value");
    }
  }
}

// Any bits as input, among them NaN, infinity, subnormal numbers and -0: the bytes, scales and zero points are the
// portable path's.
void run_any_bits(cpu::Path path, cpu::DType dtype, int64_t k, int bits, bool symmetric) {
  constexpr int64_t kRows = 24;
  constexpr uint32_t kSpecial[] = {0x00000000, 0x80000000, 0x7f800000, 0xff800000, 0x7fc00000,
                                   0x00000001, 0x7f7fffff, 0x00018001, 0x7bff7bff, 0x7c007c00};
  std::mt19937 random(static_cast<unsigned>(k));
  const int64_t in_word = dtype == cpu::DType::kFloat32 ? 1 : 2;  // elements
  std::vector<uint32_t> x(kRows * k / in_word);
  for (int64_t i = 0; i < kRows * k / in_word; ++i) {
    const int64_t row = i * in_word / k;
    // The first rows hold numbers of one size, with one special value; then come small ones; then anything.
    x[i] = (random() & 0x807f807fu) | (row < 16 ? 0x3f003f00u : 0x02000200u);
    if (row >= 20) x[i] = random();
  }
  for (int64_t row = 0; row < 10; ++row) x[(row * k + random() % k) / in_word] = kSpecial[row];
  std::vector<uint8_t> q[2];
  std::vector<float> scale[2];
  std::vector<int32_t> zero_point[2];
  for (int i = 0; i < 2; ++i) {
    q[i].resize(kRows * k + 1);
    scale[i].resize(kRows);
    zero_point[i].resize(kRows);
    cpu::force_path(i == 0 ? "scalar" : cpu::path_name(path));
    cpu::quantize_per_token(
        {x.data(), dtype, kRows, k, bits, symmetric, q[i].data(), scale[i].data(), zero_point[i].data()}, 1);
  }
  const bool same = q[0] == q[1] && zero_point[0] == zero_point[1] &&
                    std::memcmp(scale[0].data(), scale[1].data(), kRows * sizeof(float)) == 0;
  check(same, std::string(cpu::path_name(path)) + " any bits, k " + std::to_string(k));
}

// Every type of x and y, and every activation, between guard pages; the same call on ordinary memory gives the same
// bytes, and so does the portable path where an activation is exact. Also with a packed weight that holds anything: the
// result means nothing, but no page is touched.
void run_types(cpu::Path path, int64_t m, int64_t n, int64_t k, bool symmetric, bool at_end) {
  constexpr cpu::DType kTypes[] = {cpu::DType::kFloat32, cpu::DType::kBFloat16, cpu::DType::kFloat16,
                                   cpu::DType::kInt32};
  constexpr cpu::Activation kActivations[] = {cpu::Activation::kNone, cpu::Activation::kRelu, cpu::Activation::kGelu,
                                              cpu::Activation::kGeluTanh, cpu::Activation::kSilu};
  cpu::force_path(cpu::path_name(path));
  const int64_t bytes = cpu::Int8KernelLayout(n, k).bytes;
  std::mt19937 random(static_cast<unsigned>(m + n + k));
  Guarded<float> weight_scale(n, at_end), bias(n, at_end);
  Guarded<int8_t> weight(n * k, at_end), packed(bytes, at_end), anything(bytes, at_end);
  for (int64_t i = 0; i < n * k; ++i) weight[i] = static_cast<int8_t>(static_cast<int>(random() % 21) - 10);
  for (int64_t i = 0; i < n; ++i) weight_scale[i] = 0.01f, bias[i] = 0.5f;
  cpu::int8_prepack(weight.data(), n, k, packed.data(), 1);
  for (cpu::DType x_type : {cpu::DType::kFloat32, cpu::DType::kBFloat16, cpu::DType::kFloat16}) {
    const int64_t x_bytes = m * k * (x_type == cpu::DType::kFloat32 ? 4 : 2);
    Guarded<uint8_t> x(x_bytes, at_end);
    // Bits of numbers near 1 in each type: 0x3f80 is 1 in bfloat16 and 1.9 in float16, 0x3f803f80 about 1 in float32.
    for (int64_t i = 0; i < x_bytes; ++i) x[i] = i % 2 == 0 ? static_cast<uint8_t>(random() % 256) : 0x3f;
    for (cpu::DType y_type : kTypes) {
      const int64_t y_bytes = m * n * (y_type == cpu::DType::kFloat32 || y_type == cpu::DType::kInt32 ? 4 : 2);
      for (cpu::Activation activation : kActivations) {
        Guarded<uint8_t> y(y_bytes, at_end);
        std::vector<uint8_t> plain(y_bytes + 1);
        cpu::Int8LinearArgs args{x.data(),
                                 x_type,
                                 m,
                                 n,
                                 k,
                                 packed.data(),
                                 weight_scale.data(),
                                 bias.data(),
                                 symmetric ? 8 : 7,
                                 symmetric,
                                 activation,
                                 nullptr,
                                 y.data(),
                                 y_type};
        cpu::int8_linear(args, 1);
        args.y = plain.data();
        cpu::int8_linear(args, 1);
        check(std::memcmp(y.data(), plain.data(), y_bytes) == 0, "types");
        if (activation == cpu::Activation::kNone || activation == cpu::Activation::kRelu) {
          cpu::force_path("scalar");
          cpu::int8_linear(args, 1);
          cpu::force_path(cpu::path_name(path));
          check(std::memcmp(y.data(), plain.data(), y_bytes) == 0, std::string(cpu::path_name(path)) + " bits");
        }
        args.y = y.data();
        args.kernel_weight = anything.data();
        for (int fill : {0, 1, 255, 256}) {
          for (int64_t i = 0; i < bytes; ++i) anything[i] = static_cast<int8_t>(fill < 256 ? fill : random());
          cpu::int8_linear(args, 1);
        }
      }
    }
  }
}

void run_path(cpu::Path path, bool few) {
  using Sizes = std::vector<int64_t>;
  const Sizes rows = few ? Sizes{1, 3, 6, 17} : Sizes{1, 2, 5, 6, 7, 8, 9, 17, 33};
  const Sizes columns = few ? Sizes{1, 33, 48, 97} : Sizes{1, 15, 16, 17, 47, 48, 49, 97};
  const Sizes depths = few ? Sizes{0, 3, 31, 64} : Sizes{0, 1, 3, 4, 5, 31, 64, 131};
  for (bool symmetric : {true, false}) {
    for (bool at_end : {true, false}) {
      for (int64_t m : rows)
        for (int64_t n : columns)
          for (int64_t k : depths) run_case(path, m, n, k, symmetric, Fill::kNormal, at_end, 1);
      for (Fill fill : {Fill::kSmallWeights, Fill::kExtreme, Fill::kZero, Fill::kOutlier})
        for (int64_t k : {7, 256, 1021}) run_case(path, 9, 50, k, symmetric, fill, at_end, 1);
      for (int64_t m : few ? Sizes{3} : Sizes{1, 11})
        for (int64_t n : few ? Sizes{23} : Sizes{1, 23, 48, 113})
          for (int64_t k : few ? Sizes{9} : Sizes{1, 9, 33, 67}) run_types(path, m, n, k, symmetric, at_end);
    }
    for (cpu::DType dtype : {cpu::DType::kFloat32, cpu::DType::kBFloat16, cpu::DType::kFloat16})
      for (int64_t k : {1, 5, 16, 33, 67, 200})
        for (int bits : {2, 4, 7, 8}) run_any_bits(path, dtype, k, bits, symmetric);
    if (few) continue;
    run_case(path, 150, 33, 1030, symmetric, Fill::kNormal, true, 2);  // several row blocks, two threads
    run_case(path, 1, 1000, 600, symmetric, Fill::kNormal, true, 2);   // outputs split over threads
    run_case(path, 70, 97, 600, symmetric, Fill::kSmallWeights, true, 2);
    run_case(path, 2, 3, cpu::kMaxK, symmetric, Fill::kExtreme, true, 2);  // the largest sums there are
    run_case(path, 70, 20, 2049, symmetric, Fill::kExtreme, true, 3);
  }
}

}  // namespace

int main(int argc, char** argv) {
  bool few = false;
  std::vector<std::string> names;
  for (int i = 1; i < argc; ++i) {
    if (std::string(argv[i]) == "--few")
      few = true;
    else
      names.push_back(argv[i]);
  }
  if (names.empty())
    for (cpu::Path path : cpu::usable_paths()) names.push_back(cpu::path_name(path));
  for (const std::string& name : names) {
    cpu::force_path(name);  // throws where it cannot run
    run_path(cpu::current_path(), few);
    run_int4(cpu::current_path(), few);
    run_int4_sparse(cpu::current_path(), few);
    run_sparse(cpu::current_path(), few);
    run_two_four(cpu::current_path(), few);
    {
      const cpu::Path path = cpu::current_path();
      run_attention(path, few);
      cpu::force_path(name);
    }
    std::printf("ran %s\n", name.c_str());
  }
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
