// The kernels of weights with zeros against naive loops, every buffer between guard pages.

#include "sparse_kernels.h"

#include <cmath>
#include <random>
#include <vector>

#include "guarded.h"
#include "quantize_per_token.h"
#include "sparse_linear.h"

namespace cpu = tcompress::cpu;

namespace {

struct Case {
  int64_t m, n, k;
  bool floats, symmetric;
  int64_t block_rows;
  int percent;   // of the blocks that are kept
  bool hostile;  // every weight and activation at a bound
  bool at_end;
};

std::string describe(cpu::Path path, const Case& c) {
  return std::string(cpu::path_name(path)) + " sparse " + std::to_string(c.m) + "x" + std::to_string(c.n) + "x" +
         std::to_string(c.k) + (c.floats ? " f32" : (c.symmetric ? " s8" : " u7")) + " rows of " +
         std::to_string(c.block_rows) + ", " + std::to_string(c.percent) + " %";
}

// A weight [N, K] of which blocks are kept by chance.
template <class T>
void fill_weight(const Case& c, std::mt19937& random, T* weight) {
  const int64_t unit = c.floats ? 1 : cpu::kQuad, units = cpu::ceil_div(c.k, unit);
  for (int64_t row = 0; row < cpu::ceil_div(c.n, c.block_rows); ++row)
    for (int64_t u = 0; u < units; ++u) {
      const bool kept = static_cast<int>(random() % 100) < c.percent;
      for (int64_t n = row * c.block_rows; n < (row + 1) * c.block_rows && n < c.n; ++n)
        for (int64_t k = u * unit; k < (u + 1) * unit && k < c.k; ++k)
          weight[n * c.k + k] = !kept       ? T{0}
                                : c.hostile ? static_cast<T>(n % 3 == 0 ? -128 : 127)
                                            : static_cast<T>(static_cast<int>(random() % 256) - 128);
    }
}

// sparse_prepack and back; the packed weight.
struct Packed {
  cpu::SparseLayout layout;
  Guarded<uint8_t> bytes;

  Packed(const cpu::SparseWeightView& view, int64_t* counts, bool at_end, int threads)
      : layout(view.n, view.k, view.floats, view.block_rows, cpu::count_blocks(view, counts, threads)),
        bytes(cpu::round_up(layout.bytes, 8), at_end) {  // its first words have 64 bits
    cpu::sparse_prepack(view, layout, counts, bytes.data(), threads);
  }
};

// Whether any `run` blocks in a row, wherever they begin, add up in 16 bits.
bool fit_16_bits(const std::vector<std::vector<int>>& sizes, int run) {
  for (size_t first = 0; first < sizes.size(); ++first)
    for (size_t i = 0; i < sizes[first].size(); ++i) {
      int sum = 0;
      for (size_t b = first; b < sizes.size() && b < first + static_cast<size_t>(run); ++b) sum += sizes[b][i];
      if (sum > 32767) return false;
    }
  return true;
}

// By the drawing in sparse_layout.h: bits, offsets, values and, of integers, what the runs promise.
void check_layout(const cpu::SparseWeightView& view, Packed& packed, const std::string& name) {
  const cpu::SparseLayout& layout = packed.layout;
  const int64_t unit = view.floats ? 1 : cpu::kQuad, width = cpu::kUnitBytes / unit;  // bytes of a weight
  const char* weight = static_cast<const char*>(view.weight);
  const uint64_t* bitmap = reinterpret_cast<const uint64_t*>(packed.bytes.data());
  const uint32_t* offsets = reinterpret_cast<const uint32_t*>(packed.bytes.data() + layout.offsets);
  const uint8_t* values = packed.bytes.data() + layout.values;
  int64_t block = 0;
  bool right = true;
  for (int64_t row = 0; row < layout.rows; ++row) {
    right &= offsets[row] == block;
    const int run = view.floats ? 0 : packed.bytes[layout.runs + row];
    right &= view.floats || (run >= 1 && run <= cpu::kMaxSparseRun);
    std::vector<std::vector<int>> sizes;  // of each kept block and sum
    for (int64_t word = 0; word < layout.words; ++word) {
      for (int64_t u = word * cpu::kWordUnits; u < (word + 1) * cpu::kWordUnits; ++u) {
        std::vector<uint8_t> expected(layout.block_rows * cpu::kUnitBytes, 0);
        for (int64_t j = 0; j < layout.block_rows; ++j)
          for (int64_t k = u * unit; k < (u + 1) * unit; ++k) {
            const int64_t n = row * layout.block_rows + j;
            if (n < view.n && k < view.k)
              std::memcpy(expected.data() + j * cpu::kUnitBytes + (k - u * unit) * width,
                          weight + (n * view.k + k) * width, width);
          }
        bool kept = false;
        for (uint8_t byte : expected) kept |= byte != 0;
        right &= (bitmap[row * layout.words + word] >> (u % cpu::kWordUnits) & 1) == kept;
        if (!kept) continue;
        const uint8_t* got = values + block * layout.block_rows * cpu::kUnitBytes;
        right &= std::memcmp(got, expected.data(), expected.size()) == 0;
        ++block;
        if (view.floats) continue;
        sizes.emplace_back(layout.block_rows * 4, 0);
        for (size_t i = 0; i < expected.size(); ++i) {
          const int w = static_cast<int8_t>(expected[i]);
          sizes.back()[i / 2 * 2 + (w < 0)] += 127 * std::abs(w);
        }
      }
    }
    right &= fit_16_bits(sizes, run);
  }
  right &= offsets[layout.rows] == block && block == layout.blocks;
  check(right, name + " layout");
}

void run_case(cpu::Path path, const Case& c, int threads) {
  const std::string name = describe(path, c);
  std::mt19937 random(static_cast<unsigned>(c.m * 31 + c.n * 7 + c.k + c.percent));
  const int64_t weight_bytes = c.n * c.k * (c.floats ? 4 : 1);
  Guarded<uint8_t> weight(weight_bytes, c.at_end), back(weight_bytes, c.at_end), q(c.m * c.k, c.at_end);
  Guarded<float> x(c.m * c.k, c.at_end), y(c.m * c.n, c.at_end), scale(c.n, c.at_end), bias(c.n, c.at_end);
  Guarded<float> token_scale(c.m, c.at_end), residual(c.m * c.n, c.at_end);
  Guarded<int32_t> zero_point(c.m, c.at_end), sums(c.m * c.n, c.at_end);
  Guarded<int64_t> counts(cpu::ceil_div(c.n, c.block_rows), c.at_end);
  float* floats = reinterpret_cast<float*>(weight.data());
  int8_t* integers = reinterpret_cast<int8_t*>(weight.data());
  if (c.floats)
    fill_weight(c, random, floats);
  else
    fill_weight(c, random, integers);
  for (int64_t i = 0; i < x.size(); ++i)
    x[i] = c.hostile ? (random() % 4 == 0 ? -1.f : 1.f) : std::normal_distribution<float>()(random);
  for (int64_t i = 0; i < c.n; ++i) scale[i] = 0.01f * static_cast<float>(i % 7 + 1), bias[i] = 1.f;
  for (int64_t i = 0; i < residual.size(); ++i) residual[i] = static_cast<float>(i % 5);

  const cpu::SparseWeightView view{weight.data(), c.n, c.k, c.floats, c.block_rows};
  Packed packed(view, counts.data(), c.at_end, threads);
  check_layout(view, packed, name);
  cpu::sparse_unpack(packed.bytes.data(), packed.layout, c.k, c.floats, back.data(), threads);
  check(std::memcmp(back.data(), weight.data(), static_cast<size_t>(weight_bytes)) == 0, name + " unpack");

  const int bits = c.symmetric ? 8 : 7;
  cpu::SparseLinearArgs args{x.data(),
                             cpu::DType::kFloat32,
                             c.m,
                             c.n,
                             c.k,
                             packed.bytes.data(),
                             c.floats,
                             c.block_rows,
                             packed.layout.blocks,
                             scale.data(),
                             bias.data(),
                             bits,
                             c.symmetric,
                             cpu::Activation::kRelu,
                             residual.data(),
                             y.data(),
                             cpu::DType::kFloat32};
  cpu::sparse_linear(args, threads);
  if (!c.floats) {
    cpu::quantize_per_token(
        {x.data(), cpu::DType::kFloat32, c.m, c.k, bits, c.symmetric, q.data(), token_scale.data(), zero_point.data()},
        1);
    args.y = sums.data();
    args.y_dtype = cpu::DType::kInt32;
    args.residual = nullptr;
    cpu::sparse_linear(args, threads);
  }
  for (int64_t m = 0; m < c.m; ++m)
    for (int64_t n = 0; n < c.n; ++n) {
      const float got = y[m * c.n + n], after = residual[m * c.n + n];
      if (c.floats) {
        double real = bias[n], size = 1 + std::fabs(after);
        for (int64_t k = 0; k < c.k; ++k) {
          const double product = static_cast<double>(x[m * c.k + k]) * floats[n * c.k + k];
          real += product;
          size += std::fabs(product);
        }
        check(std::fabs(got - ((real > 0 ? real : 0) + after)) <= 2e-6 * size, name + " floats");
        continue;
      }
      int64_t sum = 0;
      for (int64_t k = 0; k < c.k; ++k) {
        const int a = c.symmetric ? static_cast<int8_t>(q[m * c.k + k]) : q[m * c.k + k];
        sum += static_cast<int64_t>(a - zero_point[m]) * integers[n * c.k + k];
      }
      check(sums[m * c.n + n] == sum, name + " sum");
      const float before = static_cast<float>(static_cast<int32_t>(sum)) * token_scale[m] * scale[n] + bias[n];
      check(got == (before > 0 ? before : 0.f) + after, name + " output");
    }

  // A packed weight that holds anything but in its number of blocks, which the binding holds against the size: the
  // result means nothing, but no page is touched. Then one part at a time that does.
  const cpu::SparseLayout& layout = packed.layout;
  const int64_t parts[] = {0, layout.offsets, layout.column_sums, layout.runs, layout.values, layout.bytes};
  std::vector<uint8_t> good(packed.bytes.data(), packed.bytes.data() + layout.bytes);
  const int64_t last = layout.offsets + layout.rows * 4;
  for (int fill : {0, 1, 255, 256})
    for (int part = -1; part < 5; ++part) {
      if (part >= 0 && fill != 256) continue;
      std::memcpy(packed.bytes.data(), good.data(), good.size());
      for (int64_t i = part < 0 ? 0 : parts[part]; i < (part < 0 ? layout.bytes : parts[part + 1]); ++i)
        packed.bytes[i] = static_cast<uint8_t>(fill < 256 ? fill : random());
      std::memcpy(packed.bytes.data() + last, good.data() + last, 4);
      cpu::sparse_linear(args, threads);
      cpu::sparse_unpack(packed.bytes.data(), layout, c.k, c.floats, back.data(), threads);
    }
}

// Every type of x and y between guard pages gives what the same call does on ordinary memory, and a row with NaN
// nothing but NaN.
void run_types(cpu::Path path, int64_t m, int64_t n, int64_t k, bool floats, int64_t block_rows, bool at_end) {
  const Case c{m, n, k, floats, true, block_rows, 40, false, at_end};
  const std::string name = describe(path, c) + " types";
  std::mt19937 random(static_cast<unsigned>(m + n + k));
  Guarded<uint8_t> weight(n * k * (floats ? 4 : 1), at_end);
  Guarded<float> scale(n, at_end), bias(n, at_end);
  Guarded<int64_t> counts(cpu::ceil_div(n, block_rows), at_end);
  for (int64_t i = 0; i < n; ++i) scale[i] = 0.01f, bias[i] = 0.5f;
  if (floats)
    fill_weight(c, random, reinterpret_cast<float*>(weight.data()));
  else
    fill_weight(c, random, reinterpret_cast<int8_t*>(weight.data()));
  Packed packed({weight.data(), n, k, floats, block_rows}, counts.data(), at_end, 1);
  constexpr cpu::DType kTypes[] = {cpu::DType::kFloat32, cpu::DType::kBFloat16, cpu::DType::kFloat16};
  constexpr cpu::Activation kActivations[] = {cpu::Activation::kNone, cpu::Activation::kGelu,
                                              cpu::Activation::kGeluTanh, cpu::Activation::kSilu};
  for (cpu::DType x_type : kTypes) {
    const int64_t x_element = x_type == cpu::DType::kFloat32 ? 4 : 2;
    Guarded<uint8_t> x(m * k * x_element, at_end);
    // Numbers near 1 in each type, as in kernels_test.cpp; the last byte of all makes the last row NaN.
    for (int64_t i = 0; i < x.size(); ++i) x[i] = i % 2 == 0 ? static_cast<uint8_t>(random() % 256) : 0x3f;
    x[x.size() - 1] = 0x7f;
    x[x.size() - 2] = 0xff;
    for (cpu::DType y_type : kTypes)
      for (cpu::Activation activation : kActivations) {
        const int64_t y_element = y_type == cpu::DType::kFloat32 ? 4 : 2;
        Guarded<uint8_t> y(m * n * y_element, at_end), residual(m * n * y_element, at_end);
        for (int64_t i = 0; i < residual.size(); ++i) residual[i] = i % 2 == 0 ? 0 : 0x3c;
        std::vector<uint8_t> plain(y.size());
        cpu::SparseLinearArgs args{x.data(),
                                   x_type,
                                   m,
                                   n,
                                   k,
                                   packed.bytes.data(),
                                   floats,
                                   block_rows,
                                   packed.layout.blocks,
                                   scale.data(),
                                   bias.data(),
                                   8,
                                   true,
                                   activation,
                                   residual.data(),
                                   y.data(),
                                   y_type};
        cpu::sparse_linear(args, 1);
        args.y = plain.data();
        cpu::sparse_linear(args, 1);
        check(std::memcmp(y.data(), plain.data(), plain.size()) == 0, name);
        bool nan = true, any_before = false;
        for (int64_t i = 0; i < m * n; ++i) {
          // Exponent and mantissa: infinity is the largest pattern that is no NaN.
          uint32_t bits = 0;
          std::memcpy(&bits, y.data() + i * y_element, y_element);
          const uint32_t infinity = y_type == cpu::DType::kFloat32    ? 0x7f800000u
                                    : y_type == cpu::DType::kBFloat16 ? 0x7f80u
                                                                      : 0x7c00u;
          const bool is_nan = (bits & (y_element == 4 ? 0x7fffffffu : 0x7fffu)) > infinity;
          if (i < (m - 1) * n)
            any_before |= is_nan;
          else
            nan &= is_nan;
        }
        check(nan && !any_before, name + " NaN");
      }
  }
}

}  // namespace

void run_sparse(cpu::Path path, bool few) {
  using Sizes = std::vector<int64_t>;
  // Tokens: 8 at most take the way for few, four at a time; vectors have 4, 8 or 16, tiles 32 or 64.
  const Sizes rows = few ? Sizes{1, 7, 9, 17} : Sizes{1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 33, 65, 130};
  const Sizes columns = few ? Sizes{9, 49} : Sizes{1, 7, 8, 47, 50, 97};
  const Sizes depths = few ? Sizes{3, 70, 257} : Sizes{0, 1, 5, 63, 64, 65, 256, 259};
  int turn = 0;  // the other settings take turns
  for (int64_t m : rows)
    for (int64_t n : columns)
      for (int64_t k : depths)
        for (int64_t block_rows : {1, 8})
          for (int kind : {0, 1, 2}) {
            constexpr int kPercents[] = {5, 50, 100, 20, 0};
            ++turn;
            run_case(path,
                     {m, n, k, kind == 2, kind == 0, block_rows, kPercents[turn % 5], turn % 7 == 0, turn / 2 % 2 == 0},
                     1);
          }
  for (int64_t block_rows : {1, 8})
    for (bool floats : {true, false})
      for (int64_t m : few ? Sizes{9} : Sizes{1, 6, 19}) {
        run_types(path, m, few ? 13 : 50, 67, floats, block_rows, true);
        run_types(path, m, 9, 130, floats, block_rows, false);
      }
  if (few) return;
  for (int64_t block_rows : {1, 8})
    for (int kind : {0, 1, 2}) {
      run_case(path, {35, 17, 2300, kind == 2, kind == 0, block_rows, 60, kind != 2, true}, 1);  // several tile calls
      run_case(path, {301, 60, 300, kind == 2, kind == 0, block_rows, 80, false, true}, 3);      // tokens split
      run_case(path, {1, 2500, 300, kind == 2, kind == 0, block_rows, 90, false, true}, 2);      // outputs split
      run_case(path, {20, 700, 301, kind == 2, kind == 0, block_rows, 50, true, false}, 3);
    }
}
