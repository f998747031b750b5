// The kernels of 4-bit weights with zeros against naive 64-bit loops, every buffer between guard pages. With scales of
// 1 a result is one rounding of an integer times the token's scale, and is compared bit for bit.

#include "int4_sparse_kernels.h"

#include <random>
#include <vector>

#include "guarded.h"
#include "int4_sparse_linear.h"
#include "quantize_per_token.h"

namespace cpu = tcompress::cpu;

namespace {

struct Case {
  int64_t m, n, k, group_size;
  int bits;
  bool symmetric, half_scales;
  int percent;   // of the blocks that are kept
  bool hostile;  // every weight and activation at a bound
  bool at_end;
};

std::string describe(cpu::Path path, const Case& c) {
  return std::string(cpu::path_name(path)) + " sparse int4 " + std::to_string(c.m) + "x" + std::to_string(c.n) + "x" +
         std::to_string(c.k) + " g" + std::to_string(c.group_size) + " a" + std::to_string(c.bits) + ", " +
         std::to_string(c.percent) + " %";
}

void fill_weight(const Case& c, std::mt19937& random, int8_t* weight) {
  for (int64_t row = 0; row < cpu::ceil_div(c.n, cpu::kMaxBlockRows); ++row)
    for (int64_t u = 0; u < cpu::ceil_div(c.k, cpu::kQuad); ++u) {
      const bool kept = static_cast<int>(random() % 100) < c.percent;
      for (int64_t n = row * cpu::kMaxBlockRows; n < (row + 1) * cpu::kMaxBlockRows && n < c.n; ++n)
        for (int64_t k = u * cpu::kQuad; k < (u + 1) * cpu::kQuad && k < c.k; ++k)
          weight[n * c.k + k] = static_cast<int8_t>(
              !kept ? 0 : (c.hostile ? (n % 3 == 0 || k % 5 == 0 ? 7 : -8) : static_cast<int>(random() % 16) - 8));
    }
}

void run_case(cpu::Path path, const Case& c, int threads) {
  const std::string name = describe(path, c);
  std::mt19937 random(static_cast<unsigned>(c.m * 31 + c.n * 7 + c.k));
  const int64_t groups = cpu::ceil_div(c.k, c.group_size);
  const int64_t scale_bytes = c.half_scales ? 2 : 4;
  const cpu::DType scale_dtype = c.half_scales ? cpu::DType::kFloat16 : cpu::DType::kFloat32;
  Guarded<int8_t> weight(c.n * c.k, c.at_end), back(c.n * c.k, c.at_end);
  Guarded<uint8_t> scale(c.n * groups * scale_bytes, c.at_end), scale_back(c.n * groups * scale_bytes, c.at_end);
  Guarded<uint8_t> q(c.m * c.k, c.at_end);
  Guarded<int64_t> counts(cpu::ceil_div(c.n, cpu::kMaxBlockRows), c.at_end);
  Guarded<float> x(c.m * c.k, c.at_end), y(c.m * c.n, c.at_end), bias(c.n, c.at_end), token_scale(c.m, c.at_end);
  Guarded<int32_t> zero_point(c.m, c.at_end);
  fill_weight(c, random, weight.data());
  for (int64_t i = 0; i < c.n * groups; ++i) {
    const float one = 1.f;
    const uint16_t half_one = 0x3c00;
    std::memcpy(scale.data() + i * scale_bytes, c.half_scales ? static_cast<const void*>(&half_one) : &one,
                static_cast<size_t>(scale_bytes));
  }
  // At a bound, each token's activations are those that are worst for one output.
  for (int64_t i = 0; i < x.size(); ++i)
    x[i] = c.hostile && c.n > 0 ? (weight[i / c.k % c.n * c.k + i % c.k] < 0 ? -1.f : 1.f)
                                : std::normal_distribution<float>()(random);
  for (int64_t i = 0; i < c.n; ++i) bias[i] = 0.f;

  const cpu::SparseWeightView view{weight.data(), c.n, c.k, false, cpu::kMaxBlockRows};
  const int64_t blocks = cpu::count_blocks(view, counts.data(), threads);
  const cpu::Int4SparseLayout layout(c.n, c.k, c.group_size, scale_dtype, blocks);
  Guarded<uint8_t> packed(layout.bytes, c.at_end);
  cpu::int4_sparse_prepack({weight.data(), scale.data(), counts.data()}, layout, packed.data(), threads);
  cpu::int4_sparse_unpack(packed.data(), layout, back.data(), scale_back.data(), threads);
  check(std::memcmp(back.data(), weight.data(), static_cast<size_t>(weight.size())) == 0, name + " unpack");
  check(std::memcmp(scale_back.data(), scale.data(), static_cast<size_t>(scale.size())) == 0, name + " unpack scale");

  cpu::Int4SparseLinearArgs args{x.data(),
                                 cpu::DType::kFloat32,
                                 c.m,
                                 c.n,
                                 c.k,
                                 c.group_size,
                                 packed.data(),
                                 scale_dtype,
                                 blocks,
                                 bias.data(),
                                 c.bits,
                                 c.symmetric,
                                 cpu::Activation::kNone,
                                 nullptr,
                                 y.data(),
                                 cpu::DType::kFloat32};
  cpu::int4_sparse_linear(args, threads);
  cpu::quantize_per_token(
      {x.data(), cpu::DType::kFloat32, c.m, c.k, c.bits, c.symmetric, q.data(), token_scale.data(), zero_point.data()},
      1);
  for (int64_t m = 0; m < c.m; ++m)
    for (int64_t n = 0; n < c.n; ++n) {
      int64_t sum = 0;
      for (int64_t k = 0; k < c.k; ++k) {
        const int a = c.symmetric ? static_cast<int8_t>(q[m * c.k + k]) : q[m * c.k + k];
        sum += static_cast<int64_t>(a - zero_point[m]) * weight[n * c.k + k];
      }
      check(y[m * c.n + n] == static_cast<float>(sum) * token_scale[m], name);
    }

  // A packed weight that holds anything: the result means nothing, but no page is touched.
  for (int fill : {0, 255, 256}) {
    for (int64_t i = 0; i < layout.bytes; ++i) packed[i] = static_cast<uint8_t>(fill < 256 ? fill : random());
    cpu::int4_sparse_linear(args, threads);
    cpu::int4_sparse_unpack(packed.data(), layout, back.data(), scale_back.data(), threads);
  }
}

}  // namespace

void run_int4_sparse(cpu::Path path, bool few) {
  using Sizes = std::vector<int64_t>;
  cpu::force_path(cpu::path_name(path));
  // Tokens: 8 at most take the way for few, four at a time; vectors have 4, 8 or 16, tiles 32 or 64.
  const Sizes rows = few ? Sizes{1, 7, 9, 17} : Sizes{1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 65, 130};
  const Sizes columns = few ? Sizes{9, 49} : Sizes{1, 8, 47, 50, 97};
  const Sizes depths = few ? Sizes{3, 70, 257} : Sizes{0, 1, 5, 64, 130, 259, 513};
  int turn = 0;  // the other settings take turns
  for (int64_t m : rows)
    for (int64_t n : columns)
      for (int64_t k : depths)
        for (int bits : {8, 7}) {
          constexpr int64_t kGroups[] = {32, 64, 128, 256, 512, 1 << 20};
          constexpr int kPercent[] = {0, 5, 50, 100};
          ++turn;
          run_case(path,
                   {m, n, k, kGroups[turn % 6], bits, bits == 8, turn % 5 < 2, kPercent[turn % 4], turn % 7 == 0,
                    turn % 2 == 0},
                   1);
        }
  if (few) return;
  for (int percent : {30, 100}) {
    run_case(path, {70, 97, 1100, 128, 8, true, true, percent, true, true}, 2);
    run_case(path, {1, 1000, 600, 32, 7, false, true, percent, true, true}, 2);
    run_case(path, {300, 50, 2060, 256, 8, true, false, percent, false, true}, 2);  // blocks of tiles
  }
}
