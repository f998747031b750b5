// The instructions of csrc/cuda/ptx.cuh, same names, emulated.
//
// A shared address is an offset into the block's window and every access is checked against its size. What cp.async
// brings is poison until the thread has waited for it. Warp instructions are executed once for all lanes, when the last
// has come.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "fibers.h"

namespace tcompress::cuda::ptx {

using SharedPtr = uint32_t;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
constexpr unsigned char kNotArrived = 0xEE;

inline SharedPtr shared_base() { return 0; }

namespace detail {

inline char* shared(SharedPtr p, uint32_t bytes) {
  if (p % bytes != 0) shim::fail("shared memory: misaligned address " + std::to_string(p));
  if (p > shim::shared_bytes || bytes > shim::shared_bytes - p)
    shim::fail("shared memory: address " + std::to_string(p) + " of " + std::to_string(shim::shared_bytes));
  return shim::shared_memory + p;
}

// Deposits `in`, executes `fn(inputs, outputs)` once for the warp, returns this lane's output.
template <class In, class Out, class Fn>
Out collective(const char* name, uint32_t mask, const In& in, Fn fn) {
  static_assert(sizeof(In) <= shim::kSlotBytes && sizeof(Out) <= shim::kSlotBytes);
  shim::Warp& w = shim::current_warp();
  const int lane = shim::lane();
  std::memcpy(w.in[lane], &in, sizeof in);
  shim::meet(name, mask, [&](shim::Warp& warp) {
    In inputs[shim::kWarpSize];
    Out outputs[shim::kWarpSize] = {};
    for (int i = 0; i < shim::kWarpSize; ++i) std::memcpy(&inputs[i], warp.in[i], sizeof(In));
    fn(inputs, outputs);
    for (int i = 0; i < shim::kWarpSize; ++i) std::memcpy(warp.out[i], &outputs[i], sizeof(Out));
  });
  Out out;
  std::memcpy(&out, w.out[lane], sizeof out);
  return out;
}

template <class T>
T bits(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

inline float half_to_float(uint16_t h) { return static_cast<float>(bits<_Float16>(&h)); }
inline uint16_t float_to_half(float x) {
  const _Float16 h = static_cast<_Float16>(x);
  return bits<uint16_t>(&h);
}
inline float bfloat16_to_float(uint16_t b) {
  const uint32_t u = static_cast<uint32_t>(b) << 16;
  return bits<float>(&u);
}
inline uint16_t float_to_bfloat16(float x) {
  if (std::isnan(x)) return 0x7FFF;  // as the hardware
  const uint32_t u = bits<uint32_t>(&x);
  return static_cast<uint16_t>((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}

}  // namespace detail

inline void barrier() { shim::block_barrier(); }
inline void warp_barrier() {
  shim::meet("bar.warp.sync", kAllLanes, [](shim::Warp&) {});
}

template <class T>
T shuffle_xor(T value, int lane_mask) {
  return detail::collective<T, T>("shfl.sync.bfly", kAllLanes, value, [&](const T* in, T* out) {
    for (int i = 0; i < 32; ++i) out[i] = in[i ^ lane_mask];
  });
}

inline unsigned block_anew() { return shim::block_index.x; }

inline int64_t opaque(int64_t x) { return x; }
inline unsigned thread_anew() { return shim::current->index; }

inline bool any(bool predicate) {
  return detail::collective<int, int>("vote.sync.any", kAllLanes, predicate, [](const int* in, int* out) {
    int any_lane = 0;
    for (int i = 0; i < 32; ++i) any_lane |= in[i];
    for (int i = 0; i < 32; ++i) out[i] = any_lane;
  });
}

// ---- memory

struct Words2 {
  uint32_t x, y;
};
struct Words4 {
  uint32_t x, y, z, w;
};

template <class T>
T load_shared(SharedPtr p) {
  return detail::bits<T>(detail::shared(p, sizeof(T)));
}
template <class T>
void store_shared(SharedPtr p, T value) {
  std::memcpy(detail::shared(p, sizeof(T)), &value, sizeof value);
}

template <class T>
T load_global(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) shim::fail("global memory: a misaligned load");
  return detail::bits<T>(p);
}
template <class T>
void store_global(void* p, T value) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) shim::fail("global memory: a misaligned store");
  std::memcpy(p, &value, sizeof value);
}

inline void cp_async16(SharedPtr to, const void* from, bool read) {
  if (read && reinterpret_cast<uintptr_t>(from) % 16 != 0) shim::fail("cp.async: a misaligned source");
  std::memset(detail::shared(to, 16), kNotArrived, 16);
  shim::current->open_group.push_back({to, read ? from : nullptr});
}
inline void cp_async16_once(SharedPtr to, const void* from, bool read) { cp_async16(to, from, read); }
inline void cp_async_commit() {
  shim::current->groups.push_back(std::move(shim::current->open_group));
  shim::current->open_group.clear();
}
template <int kPending>
void cp_async_wait() {
  auto& groups = shim::current->groups;
  while (static_cast<int>(groups.size()) > kPending) {
    for (const shim::Copy& c : groups.front()) {
      char* to = detail::shared(c.destination, 16);
      if (c.source)
        std::memcpy(to, c.source, 16);
      else
        std::memset(to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

// Each lane gives the address of one row of 16 bytes: lanes 0-7 those of matrix 0, and so on.
template <bool kTransposed>
inline void ldmatrix(uint32_t (&r)[4], SharedPtr row) {
  using Result = std::array<uint32_t, 4>;
  const Result out = detail::collective<SharedPtr, Result>(
      kTransposed ? "ldmatrix.trans" : "ldmatrix", kAllLanes, row, [](const SharedPtr* rows, Result* result) {
        for (int matrix = 0; matrix < 4; ++matrix) {
          uint16_t m[8][8];
          for (int i = 0; i < 8; ++i) std::memcpy(m[i], detail::shared(rows[matrix * 8 + i], 16), 16);
          for (int l = 0; l < 32; ++l) {
            const int i = l / 4, j = l % 4 * 2;
            const uint32_t low = kTransposed ? m[j][i] : m[i][j], high = kTransposed ? m[j + 1][i] : m[i][j + 1];
            result[l][matrix] = low | high << 16;
          }
        }
      });
  for (int i = 0; i < 4; ++i) r[i] = out[i];
}
inline void ldmatrix_x4(uint32_t (&r)[4], SharedPtr row) { ldmatrix<false>(r, row); }
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], SharedPtr row) { ldmatrix<true>(r, row); }

// ---- tensor cores

// d = a b + c; a 16 × 32 and b 32 × 8 of int8, one row of eight n a group of four lanes.
inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int32_t (&c)[4]) {
  struct In {
    uint32_t a[4], b[2];
    int32_t c[4];
  } in{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  using Result = std::array<int32_t, 4>;
  const Result out = detail::collective<In, Result>("mma.m16n8k32.s8", kAllLanes, in, [](const In* lanes, Result* r) {
    int8_t ma[16][32], mb[8][32];
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, t = l % 4;
      for (int i = 0; i < 4; ++i) std::memcpy(&ma[g + i % 2 * 8][t * 4 + i / 2 * 16], &lanes[l].a[i], 4);
      for (int i = 0; i < 2; ++i) std::memcpy(&mb[g][t * 4 + i * 16], &lanes[l].b[i], 4);
    }
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
        int32_t sum = 0;
        for (int k = 0; k < 32; ++k) sum += ma[row][k] * mb[column][k];
        r[l][i] = static_cast<int32_t>(static_cast<uint32_t>(lanes[l].c[i]) + static_cast<uint32_t>(sum));
      }
  });
  for (int i = 0; i < 4; ++i) d[i] = out[i];
}

// d += a b; a 16 × 64 with 2 of 4 neighbours kept. Lane (g, t) has the positions of row g + 8 (t % 2), columns 32 (t /
// 2) and the 31 after.
inline void mma_sp_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  struct In {
    uint32_t a[4], b[4];
    int32_t d[4];
    uint32_t metadata;
  } in{{a[0], a[1], a[2], a[3]}, {b[0], b[1], b[2], b[3]}, {d[0], d[1], d[2], d[3]}, metadata};
  using Result = std::array<int32_t, 4>;
  const Result out =
      detail::collective<In, Result>("mma.sp.m16n8k64.s8", kAllLanes, in, [](const In* lanes, Result* r) {
        int8_t kept[16][32], ma[16][64] = {}, mb[8][64];
        for (int l = 0; l < 32; ++l) {
          const int g = l / 4, t = l % 4;
          for (int i = 0; i < 4; ++i) std::memcpy(&kept[g + i % 2 * 8][t * 4 + i / 2 * 16], &lanes[l].a[i], 4);
          for (int i = 0; i < 4; ++i) std::memcpy(&mb[g][t * 4 + i * 16], &lanes[l].b[i], 4);
        }
        for (int row = 0; row < 16; ++row)
          for (int group = 0; group < 16; ++group) {
            const uint32_t nibble = lanes[row % 8 * 4 + row / 8 + group / 8 * 2].metadata >> (group % 8 * 4) & 15;
            const uint32_t low = nibble & 3, high = nibble >> 2;
            if (low >= high) shim::fail("mma.sp: metadata: the positions do not ascend");
            ma[row][group * 4 + low] = kept[row][group * 2];
            ma[row][group * 4 + high] = kept[row][group * 2 + 1];
          }
        for (int l = 0; l < 32; ++l)
          for (int i = 0; i < 4; ++i) {
            const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
            int32_t sum = lanes[l].d[i];
            for (int k = 0; k < 64; ++k) sum += ma[row][k] * mb[column][k];
            r[l][i] = sum;
          }
      });
  for (int i = 0; i < 4; ++i) d[i] = out[i];
}

namespace detail {

// d += a b; a 16 × 16 and b 16 × 8 of 16-bit floats, sums in float32. The hardware does not say in which order it adds;
// here once, at the end.
template <class ToFloat>
inline void mma_16(const char* name, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                   ToFloat to_float) {
  struct In {
    uint32_t a[4], b[2];
    float d[4];
  } in{{a[0], a[1], a[2], a[3]}, {b0, b1}, {d[0], d[1], d[2], d[3]}};
  using Result = std::array<float, 4>;
  const Result out = collective<In, Result>(name, kAllLanes, in, [&](const In* lanes, Result* r) {
    float ma[16][16], mb[8][16];
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, t = l % 4;
      for (int i = 0; i < 4; ++i)
        for (int e = 0; e < 2; ++e)
          ma[g + i % 2 * 8][t * 2 + i / 2 * 8 + e] = to_float(static_cast<uint16_t>(lanes[l].a[i] >> 16 * e));
      for (int i = 0; i < 2; ++i)
        for (int e = 0; e < 2; ++e) mb[g][t * 2 + i * 8 + e] = to_float(static_cast<uint16_t>(lanes[l].b[i] >> 16 * e));
    }
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
        double sum = lanes[l].d[i];
        for (int k = 0; k < 16; ++k) sum += static_cast<double>(ma[row][k]) * mb[column][k];
        r[l][i] = static_cast<float>(sum);
      }
  });
  for (int i = 0; i < 4; ++i) d[i] = out[i];
}

}  // namespace detail

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  detail::mma_16("mma.m16n8k16.f16", d, a, b0, b1, detail::half_to_float);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  detail::mma_16("mma.m16n8k16.bf16", d, a, b0, b1, detail::bfloat16_to_float);
}

// ---- arithmetic

inline float half_to_float(uint16_t h) { return detail::half_to_float(h); }
inline float bfloat16_to_float(uint16_t b) { return detail::bfloat16_to_float(b); }
inline uint32_t pack_half(float low, float high) {
  return detail::float_to_half(low) | static_cast<uint32_t>(detail::float_to_half(high)) << 16;
}
inline uint32_t pack_bfloat16(float low, float high) {
  return detail::float_to_bfloat16(low) | static_cast<uint32_t>(detail::float_to_bfloat16(high)) << 16;
}

inline uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) | bits; }
inline uint32_t subtract_halves(uint32_t a, uint32_t b) {
  const auto part = [](uint32_t x, int shift) { return detail::half_to_float(static_cast<uint16_t>(x >> shift)); };
  return pack_half(part(a, 0) - part(b, 0), part(a, 16) - part(b, 16));
}
inline uint32_t subtract_bfloat16s(uint32_t a, uint32_t b) {
  const auto part = [](uint32_t x, int shift) { return detail::bfloat16_to_float(static_cast<uint16_t>(x >> shift)); };
  return pack_bfloat16(part(a, 0) - part(b, 0), part(a, 16) - part(b, 16));
}

inline float multiply(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float divide(float a, float b) { return a / b; }
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float round_half_even(float x) { return std::nearbyint(x); }
inline int32_t to_int(float x) { return static_cast<int32_t>(x); }
inline float to_float(int32_t x) { return static_cast<float>(x); }
inline float exp2_approximate(float x) { return x < -126.f ? 0.f : std::exp2(x); }
inline float reciprocal_approximate(float x) { return 1.f / x; }
inline float log2_approximate(float x) { return std::log2(x); }
// Of two numbers, one NaN: the other.
inline float maximum(float a, float b) { return std::fmax(a, b); }
inline float minimum(float a, float b) { return std::fmin(a, b); }
inline float from_bits(uint32_t u) { return detail::bits<float>(&u); }
inline uint32_t to_bits(float x) { return detail::bits<uint32_t>(&x); }

}  // namespace tcompress::cuda::ptx
