// NEON with the dot-product extension: both schemes' activations fit signed bytes (int8_linear_neon.cpp). 32 registers.
#if defined(__aarch64__)
#pragma GCC target("arch=armv8.2-a+dotprod")

#include <arm_neon.h>

#include "epilogue.h"
#include "int4_sparse_tile.h"
#include "sparse_linear.h"
#include "sparse_tile.h"
#include "to_float.h"
#include "transpose_units.h"
#include "vec_neon.h"

namespace tcompress::cpu {
namespace {

struct Bytes {
  static constexpr bool kRounds = false;
  static constexpr int kLanes = 4;
  using Sum = int32x4_t;
  using A = int8x16_t;
  static Sum zero() { return vdupq_n_s32(0); }
  static Sum add(Sum a, Sum b) { return vaddq_s32(a, b); }
  static Sum load_sum(const uint32_t* p) { return vreinterpretq_s32_u32(vld1q_u32(p)); }
  static void store_sum(uint32_t* p, Sum s) { vst1q_u32(p, vreinterpretq_u32_s32(s)); }
  static A load(const uint32_t* p) { return vreinterpretq_s8_u32(vld1q_u32(p)); }
  static int8x16_t broadcast(const uint32_t* p) { return vreinterpretq_s8_u32(vld1q_dup_u32(p)); }
  static Sum multiply_add(Sum s, A a, int8x16_t w) { return vdotq_s32(s, a, w); }
  static Sum start(const uint32_t*) { return zero(); }
  static float load_scale(const float* p) { return *p; }
  static void add_scaled(float* acc, Sum s, float scale) {
    vst1q_f32(acc, vfmaq_n_f32(vld1q_f32(acc), vcvtq_f32_s32(s), scale));
  }
};

struct Floats {
  static constexpr bool kRounds = true;
  static constexpr int kLanes = 4;
  using Sum = float32x4_t;
  using A = float32x4_t;
  static Sum zero() { return vdupq_n_f32(0); }
  static Sum add(Sum a, Sum b) { return vaddq_f32(a, b); }
  static Sum load_sum(const uint32_t* p) { return vreinterpretq_f32_u32(vld1q_u32(p)); }
  static void store_sum(uint32_t* p, Sum s) { vst1q_u32(p, vreinterpretq_u32_f32(s)); }
  static A load(const uint32_t* p) { return load_sum(p); }
  static float32x4_t broadcast(const uint32_t* p) { return vreinterpretq_f32_u32(vld1q_dup_u32(p)); }
  static Sum multiply_add(Sum s, A a, float32x4_t w) { return vfmaq_f32(s, a, w); }
};

constexpr SparseKernels kBytes = {{tile_one_any<Bytes>, tile_eight<Bytes, 8, 3>}, {nullptr, nullptr}};

}  // namespace

const SparseLinearPath kSparseLinearNeon = {Bytes::kLanes,
                                            8,
                                            0,
                                            quantize_row_neon,
                                            row_to_float<Vec>,
                                            transpose_units,
                                            kBytes,
                                            kBytes,
                                            {{tile_one_any<Floats>, tile_eight<Floats, 8, 3>}, {nullptr, nullptr}},
                                            {0, int4_unpack<SignedUnpacker>, int4_tile<Bytes, 8, 3>, nullptr},
                                            epilogue_for<Vec>,
                                            float_epilogue_for<Vec>};

}  // namespace tcompress::cpu

#endif  // __aarch64__
