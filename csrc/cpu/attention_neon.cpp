// NEON with the dot-product extension (ARMv8.2).
//
// narrow  Q K^T: sdot, four s8 * s8 products to a 32-bit lane. P V: P' of 13 bits is split in two parts of seven bits,
//         which fit s8; the sums of the upper ones are shifted left by 7, those of the lower ones added on top.
// wide    smlal on pairs: even and odd integers of a step are told apart by the load.
//
// A tile is six queries x 16 keys (or channels).
#if defined(__aarch64__)
#pragma GCC target("arch=armv8.2-a+dotprod")

#include <arm_neon.h>

#include "attention.h"
#include "attention_softmax.h"
#include "vec_neon.h"

namespace tcompress::cpu {
namespace {

struct Shorts {
  static constexpr int kVecs = 2, kLanes = 8;
  int16x8_t v;

  static int32x4_t nearest(Vec ticks) {
    // A float that does not fit 32 bits saturates; NaN becomes 0 and is made the lowest number here, as on x86.
    const uint32x4_t number = vceqq_f32(ticks.v, ticks.v);
    return vbslq_s32(number, vcvtnq_s32_f32(ticks.v), vdupq_n_s32(-32768));
  }
  static Shorts from_ticks(const Vec* ticks) {
    return {vcombine_s16(vqmovn_s32(nearest(ticks[0])), vqmovn_s32(nearest(ticks[1])))};
  }
  static Shorts load(const int16_t* p) { return {vld1q_s16(p)}; }
  static Shorts set1(int16_t x) { return {vdupq_n_s16(x)}; }
};

inline Shorts operator+(Shorts a, Shorts b) { return {vaddq_s16(a.v, b.v)}; }
inline Shorts mul_high(Shorts a, Shorts b) { return {vqrdmulhq_s16(a.v, b.v)}; }
inline Shorts fraction(Shorts a) { return {vandq_s16(vshlq_n_s16(a.v, 4), vdupq_n_s16(0x7ff0))}; }
inline Shorts power(Shorts ticks) {
  return {vshlq_s16(vdupq_n_s16(16384), vshrq_n_s16(ticks.v, 11))};  // a negative count shifts to the right
}
template <int kCount>
inline int32_t sum(const Shorts (&p)[kCount]) {
  int32x4_t total = vdupq_n_s32(0);
  for (const Shorts& one : p) total = vpadalq_s16(total, one.v);
  return vaddvq_s32(total);
}

inline void store_sums(float* out, const Vec (&x)[4]) {
  vst1q_f32(out, vpaddq_f32(vpaddq_f32(x[0].v, x[1].v), vpaddq_f32(x[2].v, x[3].v)));
}

inline Vec from_integers(const int32_t* p) { return {vcvtq_f32_s32(vld1q_s32(p))}; }
inline void store_integers(int16_t* p, Vec a) { vst1_s16(p, vmovn_s32(vcvtnq_s32_f32(a.v))); }
inline void store_integers(int8_t* p, Vec a) {
  const int16x4_t s = vmovn_s32(vcvtnq_s32_f32(a.v));
  const uint32_t bytes = vget_lane_u32(vreinterpret_u32_s8(vmovn_s16(vcombine_s16(s, s))), 0);
  __builtin_memcpy(p, &bytes, sizeof(bytes));
}

inline uint32x4_t magnitude(Vec a) { return vandq_u32(vreinterpretq_u32_f32(a.v), vdupq_n_u32(0x7fffffff)); }
inline uint32x4_t larger(uint32x4_t a, uint32x4_t b) { return vmaxq_u32(a, b); }
inline uint32_t largest_lane(uint32x4_t a) { return vmaxvq_u32(a); }

inline void transpose_words(const int32_t* rows, int64_t stride, int64_t words, int32_t* out) {
  for (int64_t w = 0; w < words; ++w)
    for (int t = 0; t < kTokenPanel; ++t) out[w * kTokenPanel + t] = rows[t * stride + w];
}
inline void interleave(const int16_t* rows, int64_t stride, int16_t* out) {
  for (int half = 0; half < 2; ++half) {
    const int16x8x2_t both{{vld1q_s16(rows + half * 8), vld1q_s16(rows + stride + half * 8)}};
    vst2q_s16(out + half * 16, both);
  }
}
inline void interleave(const int8_t* rows, int64_t stride, int8_t* out) {
  const int8x16x4_t all{
      {vld1q_s8(rows), vld1q_s8(rows + stride), vld1q_s8(rows + 2 * stride), vld1q_s8(rows + 3 * stride)}};
  vst4q_s8(out, all);
}

constexpr int kSumStride = kKeyBlock;
constexpr int kColumns = 16;
constexpr int kWeightBits = 7;  // of a part of P'

// sums[r][16] = sum over `steps` pairs of a[r] and the columns of b, [steps][16][2].
template <int kRows>
inline void tile_wide(const int16_t* a, int64_t stride, const int16_t* b, int64_t steps, int32_t* sums) {
  int32x4_t sum[kRows][4];
#pragma GCC unroll 3
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) sum[r][c] = vdupq_n_s32(0);
  for (int64_t i = 0; i < steps; ++i, b += 2 * kColumns) {
    const int16x8x2_t low = vld2q_s16(b), high = vld2q_s16(b + kColumns);
#pragma GCC unroll 3
    for (int r = 0; r < kRows; ++r) {
      const int16_t even = a[r * stride + 2 * i], odd = a[r * stride + 2 * i + 1];
#pragma GCC unroll 2
      for (int e = 0; e < 2; ++e) {
        const int16_t x = e == 0 ? even : odd;
        sum[r][0] = vmlal_n_s16(sum[r][0], vget_low_s16(low.val[e]), x);
        sum[r][1] = vmlal_n_s16(sum[r][1], vget_high_s16(low.val[e]), x);
        sum[r][2] = vmlal_n_s16(sum[r][2], vget_low_s16(high.val[e]), x);
        sum[r][3] = vmlal_n_s16(sum[r][3], vget_high_s16(high.val[e]), x);
      }
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) vst1q_s32(sums + r * kSumStride + 4 * c, sum[r][c]);
}

// The same for bytes, b [steps][16][4]; kShift: shift what is in sums to the left by that, and add to it.
template <int kRows, int kShift = 0>
inline void tile_narrow(const int8_t* a, int64_t stride, const int8_t* b, int64_t steps, int32_t* sums) {
  int32x4_t sum[kRows][4];
#pragma GCC unroll 3
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c)
      sum[r][c] = kShift == 0 ? vdupq_n_s32(0) : vshlq_n_s32(vld1q_s32(sums + r * kSumStride + 4 * c), kShift);
  for (int64_t i = 0; i < steps; ++i, b += 4 * kColumns) {
    int8x16_t column[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) column[c] = vld1q_s8(b + 16 * c);
#pragma GCC unroll 3
    for (int r = 0; r < kRows; ++r) {
      int32_t quad;
      __builtin_memcpy(&quad, a + r * stride + 4 * i, sizeof(quad));
      const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(quad));
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) sum[r][c] = vdotq_s32(sum[r][c], column[c], x);
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) vst1q_s32(sums + r * kSumStride + 4 * c, sum[r][c]);
}

// Calls tile(number of rows as a constant, first row) until all are done.
template <int kRows>
struct Rows {
  static constexpr int value = kRows;
};
template <class Tile>
inline void in_threes(int rows, const Tile& tile) {
  int r = 0;
  for (; r + 3 <= rows; r += 3) tile(Rows<3>{}, r);
  if (rows - r == 2) tile(Rows<2>{}, r);
  if (rows - r == 1) tile(Rows<1>{}, r);
}

template <bool kWide>
struct Tiles;

template <>
struct Tiles<true> {
  using Query = int16_t;

  static int32_t sum_of(const Query*, int64_t) { return 0; }

  static void multiply(const int16_t* a, int64_t stride, int rows, const int16_t* b, int64_t steps, int32_t* sums) {
    in_threes(rows, [&](auto n, int r) {
      tile_wide<decltype(n)::value>(a + r * stride, stride, b, steps, sums + r * kSumStride);
    });
  }
  static void scores(const Query* q, int64_t stride, const int32_t*, int rows, const void* keys, int64_t dk, int panels,
                     int32_t* s) {
    for (int p = 0; p < panels; ++p)
      multiply(q, stride, rows, static_cast<const int16_t*>(keys) + p * kTokenPanel * dk, dk / 2, s + p * kTokenPanel);
  }
  static void store_weights(const Shorts (&p)[8], void* row) {
    for (int i = 0; i < 8; ++i) vst1q_s16(static_cast<int16_t*>(row) + 8 * i, p[i].v);
  }
  static void sum_values(const void* weights, int rows, const void* panel, int token_panels, int32_t* sums) {
    multiply(static_cast<const int16_t*>(weights), kKeyBlock, rows, static_cast<const int16_t*>(panel),
             token_panels * kTokenPanel / 2, sums);
  }
};

template <>
struct Tiles<false> {
  using Query = int8_t;

  static int32_t sum_of(const Query*, int64_t) { return 0; }

  static void scores(const Query* q, int64_t stride, const int32_t*, int rows, const void* keys, int64_t dk, int panels,
                     int32_t* s) {
    for (int p = 0; p < panels; ++p)
      in_threes(rows, [&](auto n, int r) {
        tile_narrow<decltype(n)::value>(q + r * stride, stride, static_cast<const int8_t*>(keys) + p * kTokenPanel * dk,
                                        dk / 4, s + p * kTokenPanel + r * kSumStride);
      });
  }
  static void store_weights(const Shorts (&p)[8], void* row) {
    int8_t* upper = static_cast<int8_t*>(row);
    for (int i = 0; i < 8; ++i) {
      vst1_s8(upper + 8 * i, vmovn_s16(vshrq_n_s16(p[i].v, kWeightBits)));
      vst1_s8(upper + kKeyBlock + 8 * i, vmovn_s16(vandq_s16(p[i].v, vdupq_n_s16((1 << kWeightBits) - 1))));
    }
  }
  static void sum_values(const void* weights, int rows, const void* panel, int token_panels, int32_t* sums) {
    const int8_t* upper = static_cast<const int8_t*>(weights);
    const int8_t* values = static_cast<const int8_t*>(panel);
    const int64_t steps = token_panels * kTokenPanel / 4;
    in_threes(rows, [&](auto n, int r) {
      constexpr int kRows = decltype(n)::value;
      const int8_t* w = upper + r * kWeightBytes;
      tile_narrow<kRows>(w, kWeightBytes, values, steps, sums + r * kSumStride);
      tile_narrow<kRows, kWeightBits>(w + kKeyBlock, kWeightBytes, values, steps, sums + r * kSumStride);
    });
  }
};

template <bool kWide>
struct AllTiles : Tiles<kWide> {
  static void values(const void* weights, int rows, const void* values, int token_panels, int64_t dv,
                     const float* factor, float* out) {
    int32_t sums[kQueryTile * kSumStride];
    for (int64_t c = 0; c < dv; c += kChannelPanel) {
      const char* panel = static_cast<const char*>(values) + c * kKeyBlock * (kWide ? 2 : 1);
      Tiles<kWide>::sum_values(weights, rows, panel, token_panels, sums);
      for (int r = 0; r < rows; ++r)
        for (int i = 0; i < kChannelPanel; i += 4) {
          float* o = out + r * dv + c + i;
          const Vec product = from_integers(sums + r * kSumStride + i) * Vec::set1(factor[r]);
          store(o, Vec::load(o) + product);
        }
    }
  }
};

}  // namespace
}  // namespace tcompress::cpu

#include "attention_pack.h"
#include "attention_rows.h"
#include "short_attention_rows.h"

namespace tcompress::cpu {

const AttentionPath kAttentionNeon = {/*narrow_prefill=*/true,
                                      attend<Vec, Shorts, AllTiles<true>, true>,
                                      attend<Vec, Shorts, AllTiles<false>, false>,
                                      combine<Vec>,
                                      key_mean<Vec>,
                                      pack<Vec>,
                                      short_rows<Vec, 4>};

}  // namespace tcompress::cpu

#endif  // __aarch64__
