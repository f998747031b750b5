// The attention kernels, every buffer between guard pages: every path against the portable one bit for bit, and that
// one against a softmax in float64.

#include "attention_kernels.h"

#include <cmath>
#include <random>
#include <vector>

#include "attention.h"
#include "guarded.h"
#include "short_attention.h"

namespace cpu = tcompress::cpu;

namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr float kInfinity = __builtin_inff();

enum class MaskKind { kNone, kBool, kFloat, kKeys };

struct Case {
  int64_t heads, kv_heads, sq, skv, d, dv;
  int bits = 8;
  int64_t left = -1, right = -1;
  bool bottom_right = false;
  MaskKind mask = MaskKind::kNone;
  float softcap = 0;
  bool hostile = false, at_end = true;
  int threads = 1;
};

std::string describe(const Case& c) {
  std::string name = "attention";
  for (int64_t n : {c.heads, c.kv_heads, c.sq, c.skv, c.d, c.dv, int64_t{c.bits}, c.left, c.right})
    name += " " + std::to_string(n);
  return name;
}

struct Inputs {
  Guarded<float> q, k, v, mask;
  Guarded<uint8_t> seen;

  explicit Inputs(const Case& c)
      : q(c.heads * c.sq * c.d, c.at_end),
        k(c.kv_heads * c.skv * c.d, c.at_end),
        v(c.kv_heads * c.skv * c.dv, c.at_end),
        mask(c.mask == MaskKind::kFloat ? c.sq * c.skv : 0, c.at_end),
        seen(c.mask == MaskKind::kBool ? c.sq * c.skv : (c.mask == MaskKind::kKeys ? c.skv : 0), c.at_end) {
    std::mt19937 random(static_cast<unsigned>(c.sq * 1009 + c.skv * 31 + c.d));
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < q.size(); ++i) q[i] = normal(random);
    for (int64_t i = 0; i < k.size(); ++i) k[i] = normal(random) + static_cast<float>(i % c.d % 5);
    for (int64_t i = 0; i < v.size(); ++i) v[i] = normal(random);
    for (int64_t i = 0; i < mask.size(); ++i) mask[i] = random() % 5 == 0 ? -kInfinity : normal(random);
    for (int64_t i = 0; i < seen.size(); ++i) seen[i] = random() % 4 != 0;
    if (!c.hostile) return;
    for (int64_t i = 0; i < k.size(); i += 7) k[i] = 0;
    if (q.size() > 3) q[3] = 1e30f;
    if (k.size() > 5) k[5] = __builtin_nanf("");
    if (v.size() > 0) v[v.size() - 1] = kInfinity;
    if (q.size() > 0) q[q.size() - 1] = __builtin_nanf("");
  }

  cpu::AttentionMask view(const Case& c) {
    if (c.mask == MaskKind::kNone) return {};
    if (c.mask == MaskKind::kFloat) return {mask.data(), false, cpu::DType::kFloat32, 0, 0, c.skv, 1};
    return {seen.data(), true, cpu::DType::kFloat32, 0, 0, c.mask == MaskKind::kBool ? c.skv : 0, 1};
  }

  bool visible(const Case& c, int64_t i, int64_t j) {
    const int64_t position = i + (c.bottom_right ? c.skv - c.sq : 0);
    if (c.left >= 0 && j < position - c.left) return false;
    if (c.right >= 0 && j > position + c.right) return false;
    if (c.mask == MaskKind::kBool) return seen[i * c.skv + j] != 0;
    if (c.mask == MaskKind::kKeys) return seen[j] != 0;
    return c.mask != MaskKind::kFloat || mask[i * c.skv + j] != -kInfinity;
  }
};

struct Result {
  Guarded<float> out, lse;

  explicit Result(const Case& c) : out(c.heads * c.sq * c.dv, c.at_end), lse(c.heads * c.sq, c.at_end) {}

  bool same_bits(Result& other) {
    return std::memcmp(out.data(), other.out.data(), out.size() * 4) == 0 &&
           std::memcmp(lse.data(), other.lse.data(), lse.size() * 4) == 0;
  }
};

cpu::AttentionArgs arguments(const Case& c, Inputs& in, Result* result) {
  const double scale = 1 / std::sqrt(static_cast<double>(c.d));
  cpu::AttentionArgs args{};
  args.batch = 1;
  args.heads = c.heads;
  args.kv_heads = c.kv_heads;
  args.d = c.d;
  args.dv = c.dv;
  args.dtype = cpu::DType::kFloat32;
  args.q = {in.q.data(), 0, c.sq * c.d, c.d};
  args.sq = c.sq;
  args.skv = c.skv;
  args.bits = c.bits;
  args.scale_ticks = static_cast<float>(scale * 2048 * kLog2E);
  args.scale = static_cast<float>(scale);
  args.softcap = c.softcap;
  args.softcap_ticks = static_cast<float>(c.softcap * 2048 * kLog2E);
  args.softcap_factor = c.softcap == 0 ? 0 : -2 / c.softcap;
  args.window = {c.bottom_right, c.left, c.right};
  args.mask = in.view(c);
  args.out = result->out.data();
  args.out_stride_h = c.sq * c.dv;
  args.out_stride_s = c.dv;
  args.lse = result->lse.data();
  args.lse_stride_h = c.sq;
  return args;
}

void attend(const char* path, const Case& c, Inputs& in, Result* result) {
  cpu::force_path(path);
  cpu::attention(arguments(c, in, result), {in.k.data(), 0, c.skv * c.d, c.d}, {in.v.data(), 0, c.skv * c.dv, c.dv},
                 c.threads);
}

// The cache is filled in two parts; its tensors are compared through what they give.
void attend_cached(const char* path, const Case& c, Inputs& in, Result* result, int threads) {
  cpu::force_path(path);
  const int64_t capacity = (c.skv + cpu::kKeyBlock - 1) / cpu::kKeyBlock;
  Guarded<int8_t> k(c.kv_heads * capacity * cpu::key_block_bytes(c.d, false), c.at_end);
  Guarded<int8_t> v(c.kv_heads * capacity * cpu::value_block_bytes(c.dv, false), c.at_end);
  Guarded<float> k_scale(c.kv_heads * capacity * cpu::kKeyBlock, c.at_end), v_scale(k_scale.size(), c.at_end);
  Guarded<float> mean(c.kv_heads * c.d, c.at_end);
  const cpu::KvCacheView cache{k.data(), k_scale.data(), v.data(), v_scale.data(), mean.data(), capacity};
  const int64_t first = c.skv / 3 + 1;
  for (int64_t done = 0; done < c.skv; done = done == 0 ? first : c.skv)
    cpu::kv_cache_append(
        cache, 1, c.kv_heads, c.d, c.dv, cpu::DType::kFloat32, {in.k.data() + done * c.d, 0, c.skv * c.d, c.d},
        {in.v.data() + done * c.dv, 0, c.skv * c.dv, c.dv}, done == 0 ? first : c.skv - first, done, threads);
  cpu::kv_cache_attention(arguments(c, in, result), cache, threads);
}

// Σ|Δ| / Σ|O| against float64.
double error_of(const Case& c, Inputs& in, Result& result, bool lse_too = true) {
  double difference = 0, size = 1e-30;
  const double scale = 1 / std::sqrt(static_cast<double>(c.d));
  std::vector<double> p(c.skv), o(c.dv);
  for (int64_t h = 0; h < c.heads; ++h)
    for (int64_t i = 0; i < c.sq; ++i) {
      const int64_t hk = h / (c.heads / c.kv_heads);
      double highest = -INFINITY, total = 0;
      for (int64_t j = 0; j < c.skv; ++j) {
        p[j] = 0;
        for (int64_t e = 0; e < c.d; ++e)
          p[j] += static_cast<double>(in.q[(h * c.sq + i) * c.d + e]) * in.k[(hk * c.skv + j) * c.d + e];
        p[j] *= scale;
        if (c.softcap != 0) p[j] = c.softcap * std::tanh(p[j] / c.softcap);
        if (c.mask == MaskKind::kFloat) p[j] += in.mask[i * c.skv + j];
        if (!in.visible(c, i, j)) p[j] = -INFINITY;
        highest = std::max(highest, p[j]);
      }
      for (double& one : p) total += one = highest == -INFINITY ? 0 : std::exp(one - highest);
      for (int64_t e = 0; e < c.dv; ++e) {
        o[e] = 0;
        for (int64_t j = 0; j < c.skv; ++j) o[e] += p[j] * in.v[(hk * c.skv + j) * c.dv + e];
        if (total > 0) o[e] /= total;
        difference += std::fabs(result.out[(h * c.sq + i) * c.dv + e] - o[e]);
        size += std::fabs(o[e]);
      }
      if (!lse_too) continue;
      const double lse = total > 0 ? std::log(total) + highest : -INFINITY;
      const double got = result.lse[h * c.sq + i];
      check(lse == got || std::fabs(lse - got) < (c.bits == 8 ? 0.1 : 0.01), describe(c) + " lse");
    }
  return difference / size;
}

void run_case(const char* path, Case c) {
  for (int bits : {8, 12})
    for (bool at_end : {true, false}) {
      c.bits = bits;
      c.at_end = at_end;
      Inputs in(c);
      Result expected(c), got(c), cached(c), cached_here(c);
      attend("scalar", c, in, &expected);
      attend(path, c, in, &got);
      check(got.same_bits(expected), std::string(path) + " " + describe(c));
      if (!c.hostile) {
        // A few queries over a few keys, of a few channels, have errors that do not average out.
        const double bound = (bits == 8 ? 0.018 : 0.002) * (c.d < 16 ? 4 : (c.skv * c.d < 2000 ? 2 : 1));
        const double error = error_of(c, in, expected);
        check(error < bound, describe(c) + " error " + std::to_string(error));
      }
      if (bits != 8 || c.skv == 0) continue;
      attend_cached("scalar", c, in, &cached, 1);
      attend_cached(path, c, in, &cached_here, 1);
      check(cached_here.same_bits(cached), std::string(path) + " from a cache " + describe(c));
      if (c.hostile) continue;
      check(error_of(c, in, cached) < 0.04, describe(c) + " from a cache");
    }
}

// In float32: every path against float64. A query that sees something hostile gives NaN, on every path the same ones.
void run_short(const char* path, Case c) {
  for (bool at_end : {true, false}) {
    c.at_end = at_end;
    c.bits = 12;
    Inputs in(c);
    Result got(c);
    cpu::ShortArgs args{};
    args.batch = 1;
    args.heads = c.heads;
    args.kv_heads = c.kv_heads;
    args.sq = c.sq;
    args.skv = c.skv;
    args.d = c.d;
    args.dv = c.dv;
    args.dtype = cpu::DType::kFloat32;
    args.q = {in.q.data(), 0, c.sq * c.d, c.d};
    args.k = {in.k.data(), 0, c.skv * c.d, c.d};
    args.v = {in.v.data(), 0, c.skv * c.dv, c.dv};
    args.first = c.right < 0 ? c.skv : 1 + c.right + (c.bottom_right ? c.skv - c.sq : 0);
    args.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(c.d)));
    args.out = got.out.data();
    args.out_stride_h = c.sq * c.dv;
    args.out_stride_s = c.dv;
    cpu::force_path(path);
    cpu::short_attention(args, c.threads);
    const std::string what = std::string(path) + " short " + describe(c);
    if (!c.hostile) {
      const double error = error_of(c, in, got, /*lse_too=*/false);
      check(error < 2e-6, what + " error " + std::to_string(error));
      continue;
    }
    for (int64_t h = 0; h < c.heads; ++h)
      for (int64_t i = 0; i < c.sq; ++i) {
        const auto finite = [&](Guarded<float>& x, int64_t row, int64_t n) {
          for (int64_t e = 0; e < n; ++e)
            if (!std::isfinite(x[row * n + e])) return false;
          return true;
        };
        bool bad = false;
        for (int64_t j = 0; j < c.skv; ++j) {
          const int64_t row = h / (c.heads / c.kv_heads) * c.skv + j;
          bad |= in.visible(c, i, j) &&
                 !(finite(in.q, h * c.sq + i, c.d) && finite(in.k, row, c.d) && finite(in.v, row, c.dv));
        }
        for (int64_t e = 0; e < c.dv; ++e) check(std::isnan(got.out[(h * c.sq + i) * c.dv + e]) == bad, what + " NaN");
      }
  }
}

void run_all_short(const char* name, bool few) {
  for (int64_t sq : few ? std::vector<int64_t>{1, 7} : std::vector<int64_t>{1, 2, 3, 4, 5, 7, 13})
    for (int64_t skv : few ? std::vector<int64_t>{1, 18} : std::vector<int64_t>{1, 3, 4, 5, 15, 16, 17, 33, 63, 64})
      for (int64_t d : few ? std::vector<int64_t>{18} : std::vector<int64_t>{1, 15, 16, 33, 64, 256}) {
        run_short(name, {2, 1, sq, skv, d, d < 254 ? d + 3 : d});
        run_short(name, {2, 2, sq, skv, d, d, 12, -1, 0, true});
      }
  run_short(name, {2, 2, 9, 9, 64, 64, 12, -1, 0, false, MaskKind::kNone, 0, /*hostile=*/true});
  run_short(name, {2, 1, 20, 7, 30, 48, 12, -1, 0, true, MaskKind::kNone, 0, /*hostile=*/true});
  for (int threads : {2, 3}) {
    Case c{4, 4, 48, 48, 64, 64, 12, -1, 0, false};
    c.threads = threads;
    run_short(name, c);
    c.heads = c.kv_heads = 1;
    run_short(name, c);
  }
}

}  // namespace

void run_attention(cpu::Path path, bool few) {
  const char* name = cpu::path_name(path);
  for (int64_t sq : few ? std::vector<int64_t>{1, 7} : std::vector<int64_t>{1, 5, 6, 7, 13, 97})
    for (int64_t skv : few ? std::vector<int64_t>{17, 65} : std::vector<int64_t>{1, 15, 16, 17, 63, 64, 65, 129})
      for (int64_t d : few ? std::vector<int64_t>{18} : std::vector<int64_t>{1, 16, 18, 65}) {
        run_case(name, {2, 1, sq, skv, d, d + 3});
        run_case(name, {1, 1, sq, skv, d, d, 8, -1, 0, true});
      }
  run_case(name, {4, 2, 20, 150, 64, 64, 8, 30, 5, false});
  run_case(name, {2, 2, 70, 70, 32, 48, 8, -1, 0, false, MaskKind::kBool});
  run_case(name, {1, 1, 9, 70, 40, 16, 8, -1, -1, false, MaskKind::kFloat});
  run_case(name, {2, 1, 9, 200, 24, 16, 8, -1, -1, false, MaskKind::kKeys});
  run_case(name, {2, 1, 9, 100, 24, 16, 8, 20, 0, true, MaskKind::kFloat, 3.f});
  run_case(name, {2, 2, 9, 100, 24, 16, 8, -1, 0, true, MaskKind::kNone, 0, true});
  run_case(name, {2, 2, 9, 100, 24, 16, 8, -1, -1, false, MaskKind::kFloat, 2.f, true});
  run_case(name, {1, 1, 3, 130, 256, 256});
  run_all_short(name, few);
  if (few) return;
  for (int threads : {2, 3}) {
    Case c{4, 4, 130, 300, 64, 64, 8, -1, 0, false};
    c.threads = threads;  // with 3: heads are packed first, and blocks of queries handed out
    run_case(name, c);
    Case one{2, 1, 1, 1500, 64, 64};
    Inputs in(one);
    Result split(one), whole(one);
    attend_cached(name, one, in, &whole, 1);
    attend_cached(name, one, in, &split, threads);  // the keys are split
    for (int64_t i = 0; i < split.out.size(); ++i)
      check(std::fabs(split.out[i] - whole.out[i]) < 1e-6, std::string(name) + " split keys");
  }
}
