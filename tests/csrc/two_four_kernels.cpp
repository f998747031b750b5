// The kernels of the layout 2:4 against naive 64-bit loops, every buffer between guard pages.

#include "two_four_kernels.h"

#include <random>
#include <vector>

#include "guarded.h"
#include "quantize_per_token.h"
#include "two_four_linear.h"

namespace cpu = tcompress::cpu;

namespace {

// largest: of the weights in size; with 128 all kept ones are at a bound, which one is left to chance.
void run_case(cpu::Path path, int64_t m, int64_t n, int64_t k, bool symmetric, int largest, bool at_end, int threads) {
  const std::string name = std::string(cpu::path_name(path)) + " 2:4 " + std::to_string(m) + "x" + std::to_string(n) +
                           "x" + std::to_string(k) + " w" + std::to_string(largest);
  std::mt19937 random(static_cast<unsigned>(m * 1000003 + n * 1009 + k));
  const cpu::TwoFourLayout layout(n, k);
  Guarded<int8_t> weight(n * k, at_end), back(n * k, at_end), packed(layout.bytes, at_end);
  Guarded<float> x(m * k, at_end), scale(m, at_end), weight_scale(n, at_end);
  Guarded<uint8_t> q(m * k, at_end);
  Guarded<int32_t> zero_point(m, at_end), sums(m * n, at_end);
  std::memset(weight.data(), 0, static_cast<size_t>(n * k));
  for (int64_t row = 0; row < n; ++row)
    for (int64_t quad = 0; quad < k; quad += cpu::kQuad)
      for (int kept = 0; kept < 2; ++kept) {
        const int64_t place = quad + static_cast<int64_t>(random() % cpu::kQuad);
        if (place >= k) continue;
        const int w = largest == 128 ? (row % 3 == 0 || random() % 2 == 0 ? -128 : 127)
                                     : static_cast<int>(random() % (2 * largest + 1)) - largest;
        weight[row * k + place] = static_cast<int8_t>(w);
      }
  // At a bound, each token's activations are those that are worst for one output.
  for (int64_t i = 0; i < m * k; ++i)
    x[i] = largest == 128 && n > 0 ? (weight[i / k % n * k + i % k] < 0 ? 1.f : -1.f)
                                   : std::normal_distribution<float>()(random);
  for (int64_t i = 0; i < n; ++i) weight_scale[i] = 1.f;

  check(cpu::two_four_prepack(weight.data(), layout, packed.data(), threads), name + " fits");
  cpu::two_four_unpack(packed.data(), layout, back.data(), threads);
  check(std::memcmp(back.data(), weight.data(), static_cast<size_t>(n * k)) == 0, name + " unpack");
  const int bits = symmetric ? 8 : 7;
  cpu::Int8LinearArgs args{x.data(),
                           cpu::DType::kFloat32,
                           m,
                           n,
                           k,
                           packed.data(),
                           weight_scale.data(),
                           nullptr,
                           bits,
                           symmetric,
                           cpu::Activation::kNone,
                           nullptr,
                           sums.data(),
                           cpu::DType::kInt32};
  cpu::two_four_linear(args, threads);
  cpu::quantize_per_token(
      {x.data(), cpu::DType::kFloat32, m, k, bits, symmetric, q.data(), scale.data(), zero_point.data()}, 1);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      int64_t sum = 0;
      for (int64_t p = 0; p < k; ++p) {
        const int64_t a = symmetric ? static_cast<int8_t>(q[i * k + p]) : q[i * k + p];
        sum += (a - zero_point[i]) * weight[j * k + p];
      }
      check(sums[i * n + j] == sum, name + " sum");
    }

  // A packed weight that holds anything: the result means nothing, but no page is touched.
  for (int fill : {0, 255, 256}) {
    for (int64_t i = 0; i < layout.bytes; ++i) packed[i] = static_cast<int8_t>(fill < 256 ? fill : random());
    cpu::two_four_linear(args, threads);
    cpu::two_four_unpack(packed.data(), layout, back.data(), threads);
  }
}

}  // namespace

void run_two_four(cpu::Path path, bool few) {
  using Sizes = std::vector<int64_t>;
  cpu::force_path(cpu::path_name(path));
  for (bool symmetric : {true, false})
    for (bool at_end : {true, false})
      for (int largest : {20, 63, 128})
        for (int64_t m : few ? Sizes{1, 18} : Sizes{1, 15, 16, 17, 33, 64, 65})
          for (int64_t n : few ? Sizes{49} : Sizes{1, 47, 48, 49, 97})
            for (int64_t k : few ? Sizes{0, 67} : Sizes{0, 1, 3, 4, 5, 63, 64, 65, 131})
              run_case(path, m, n, k, symmetric, largest, at_end, 1);
  if (few) return;
  for (bool symmetric : {true, false}) {
    run_case(path, 150, 97, 1030, symmetric, 63, true, 2);
    run_case(path, 3, 5, cpu::kMaxK, symmetric, 128, true, 2);
  }
}
