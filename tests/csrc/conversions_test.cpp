// float16 and bfloat16 to float32 and back, of every path, against exact arithmetic in double: all 65536 numbers to
// float32; to 16 bits the neighbourhood of every boundary between two results, and a sample of all float32 numbers.
// Arguments: the paths that this processor can run. Exits with 1 after a failure; prints each.

#include "conversions.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

extern const Conversions kScalar, kAvx2, kAvx512Vnni, kNeon;

namespace {

constexpr int kBlock = 1 << 16;
int64_t failures = 0;

float float_from(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// A 16-bit type by its definition: (-1)^sign 2^(exponent - bias) 1.fraction.
struct Type {
  const char* name;
  int exponent_bits, fraction_bits;

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  uint32_t infinity() const { return ((1u << exponent_bits) - 1) << fraction_bits; }

  // Exact; infinity and NaN included.
  double value(uint32_t bits) const {
    const double sign = (bits & 0x8000u) != 0 ? -1 : 1;
    const uint32_t magnitude = bits & 0x7fffu;
    if (magnitude > infinity()) return NAN;
    if (magnitude == infinity()) return sign * INFINITY;
    const int exponent = static_cast<int>(magnitude >> fraction_bits);
    const uint32_t fraction = magnitude & ((1u << fraction_bits) - 1);
    const double significand = fraction + (exponent > 0 ? 1 << fraction_bits : 0);
    return sign * std::ldexp(significand, (exponent > 0 ? exponent : 1) - bias() - fraction_bits);
  }

  // The nearest number, ties to even: the multiple of x's unit in the last place, by rint of an exact quotient.
  uint32_t nearest(float x) const {
    const uint32_t sign = std::signbit(x) ? 0x8000u : 0;
    if (std::isnan(x)) return sign | infinity() | (1u << (fraction_bits - 1));
    const double magnitude = std::fabs(static_cast<double>(x));
    if (magnitude == INFINITY) return sign | infinity();
    int exponent = magnitude > 0 ? std::ilogb(magnitude) : -bias();
    if (exponent < 1 - bias()) exponent = 1 - bias();
    const double units = std::rint(std::ldexp(magnitude, fraction_bits - exponent));
    // Carries into the exponent, and from the largest number into infinity, by themselves.
    const int64_t result = (static_cast<int64_t>(exponent + bias() - 1) << fraction_bits) + static_cast<int64_t>(units);
    return sign | static_cast<uint32_t>(result < infinity() ? result : infinity());
  }
};

constexpr Type kHalf{"float16", 5, 10}, kBFloat16{"bfloat16", 8, 7};

void fail(const std::string& path, const Type& type, const char* what, uint32_t from, uint32_t got, uint32_t expected) {
  if (++failures <= 20)
    std::printf("FAILED %s %s %s: from %08x got %08x, expected %08x\n", path.c_str(), type.name, what, from, got,
                expected);
}

void check_to_float(const std::string& path, const Type& type, Conversions::Convert convert) {
  std::vector<uint16_t> from(kBlock);
  std::vector<float> to(kBlock);
  for (int i = 0; i < kBlock; ++i) from[i] = static_cast<uint16_t>(i);
  convert(from.data(), to.data(), kBlock);
  for (uint32_t i = 0; i < kBlock; ++i) {
    const float expected = static_cast<float>(type.value(i));  // exact
    const bool same = std::isnan(expected) ? std::isnan(to[i]) : bits_of(to[i]) == bits_of(expected);
    if (!same) fail(path, type, "to float", i, bits_of(to[i]), bits_of(expected));
  }
}

void check_from_float(const std::string& path, const Type& type, Conversions::Convert convert,
                      const std::vector<float>& from) {
  std::vector<uint16_t> to(from.size());
  convert(from.data(), to.data(), static_cast<int64_t>(from.size()));
  for (size_t i = 0; i < from.size(); ++i) {
    const uint32_t expected = type.nearest(from[i]);
    // Any NaN will do, as long as it is one.
    const bool same = std::isnan(from[i]) ? (to[i] & 0x7fffu) > type.infinity() : to[i] == expected;
    if (!same) fail(path, type, "from float", bits_of(from[i]), to[i], expected);
  }
}

// Every number of the type, every midpoint of two neighbours, and the float32 numbers next to each.
std::vector<float> boundaries(const Type& type) {
  std::vector<float> numbers;
  for (uint32_t i = 0; i < type.infinity(); ++i) {
    const double here = type.value(i), step = type.value(i + 1 < type.infinity() ? i + 1 : i) - here;
    const double unit = step > 0 ? step : here - type.value(i - 1);
    for (double x : {here, here + unit / 2}) {
      const float f = static_cast<float>(x);
      for (float neighbour : {f, std::nextafterf(f, INFINITY), std::nextafterf(f, -INFINITY)}) {
        numbers.push_back(neighbour);
        numbers.push_back(-neighbour);
      }
    }
  }
  while (numbers.size() % 16 != 0) numbers.push_back(0.f);
  return numbers;
}

void check_path(const std::string& path, const Conversions& conversions) {
  check_to_float(path, kHalf, conversions.half_to_float);
  check_to_float(path, kBFloat16, conversions.bfloat16_to_float);
  check_from_float(path, kHalf, conversions.float_to_half, boundaries(kHalf));
  check_from_float(path, kBFloat16, conversions.float_to_bfloat16, boundaries(kBFloat16));
  std::vector<float> sample(kBlock);
  for (uint64_t first = 0; first < (uint64_t{1} << 32);) {
    for (float& x : sample) {
      x = float_from(static_cast<uint32_t>(first));
      first += 1021;  // prime: every low bit pattern meets every high one
    }
    check_from_float(path, kHalf, conversions.float_to_half, sample);
    check_from_float(path, kBFloat16, conversions.float_to_bfloat16, sample);
  }
  std::printf("checked %s, %d lanes\n", path.c_str(), conversions.lanes);
}

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string path = argv[i];
    if (path == "scalar") check_path(path, kScalar);
#if defined(__aarch64__)
    if (path == "neon") check_path(path, kNeon);
#elif defined(__x86_64__)
    if (path == "avx2") check_path(path, kAvx2);
    if (path == "avx512vnni") check_path(path, kAvx512Vnni);  // AMX has the same epilogue
#endif
  }
  std::printf("%lld failures\n", static_cast<long long>(failures));
  return failures == 0 ? 0 : 1;
}
