// Portable path: four tokens in an array, which a compiler vectorizes with whatever the baseline has.

#include "epilogue.h"
#include "int4_sparse_tile.h"
#include "sparse_linear.h"
#include "sparse_tile.h"
#include "to_float.h"
#include "transpose_units.h"
#include "vec_scalar.h"

namespace tcompress::cpu {
namespace {

template <class T>
struct Four {
  T v[4];
};

template <class T>
struct Lanes {
  static constexpr int kLanes = 4;
  using Sum = Four<T>;
  using A = Four<uint32_t>;
  static Sum zero() { return {}; }
  static Sum add(Sum a, const Sum& b) {
    for (int t = 0; t < kLanes; ++t) a.v[t] += b.v[t];
    return a;
  }
  static Sum load_sum(const uint32_t* p) {
    Sum s;
    std::memcpy(s.v, p, sizeof(s.v));
    return s;
  }
  static void store_sum(uint32_t* p, const Sum& s) { std::memcpy(p, s.v, sizeof(s.v)); }
  static A load(const uint32_t* p) {
    A a;
    std::memcpy(a.v, p, sizeof(a.v));
    return a;
  }
  static uint32_t broadcast(const uint32_t* p) { return *p; }
};

// Activations -127 … 127 or 0 … 127: both are signed bytes.
struct Bytes : Lanes<int32_t> {
  static constexpr bool kRounds = false;
  static Sum start(const uint32_t*) { return zero(); }
  static float load_scale(const float* p) { return *p; }
  static void add_scaled(float* acc, const Sum& s, float scale) {
    for (int t = 0; t < kLanes; ++t) acc[t] += static_cast<float>(s.v[t]) * scale;
  }
  static int32_t byte(uint32_t unit, int i) { return static_cast<int8_t>(unit >> (8 * i)); }
  static Sum multiply_add(Sum s, A a, uint32_t w) {
    for (int t = 0; t < kLanes; ++t)
      for (int i = 0; i < kQuad; ++i) s.v[t] += byte(a.v[t], i) * byte(w, i);
    return s;
  }
};

struct Floats : Lanes<float> {
  static constexpr bool kRounds = true;
  static Sum multiply_add(Sum s, A a, uint32_t w) {
    for (int t = 0; t < kLanes; ++t) s.v[t] += float_from_bits(a.v[t]) * float_from_bits(w);
    return s;
  }
};

constexpr SparseKernels kBytes = {{tile_one_any<Bytes>, tile_eight<Bytes, 4, 2>}, {nullptr, nullptr}};

}  // namespace

const SparseLinearPath kSparseLinearScalar = {Bytes::kLanes,
                                              8,
                                              0,
                                              quantize_row_scalar,
                                              row_to_float<Vec>,
                                              transpose_units,
                                              kBytes,
                                              kBytes,
                                              {{tile_one_any<Floats>, tile_eight<Floats, 4, 2>}, {nullptr, nullptr}},
                                              {0, int4_unpack<SignedUnpacker>, int4_tile<Bytes, 4, 2>, nullptr},
                                              epilogue_for<Vec>,
                                              float_epilogue_for<Vec>};

}  // namespace tcompress::cpu
