// Instructions that C++ has no word for, each in a small function; tests/gpu/shim/ptx_on_cpu.h emulates the same names.
// Include through platform.cuh. All run on compute capability 8.0 and above.
//
// `SharedPtr` is an address in the window of shared memory, 32 bits: half the registers of a pointer, and what ldmatrix
// and cp.async take.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace tcompress::cuda::ptx {

using SharedPtr = uint32_t;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

#define TC_PTX __device__ __forceinline__

// First byte of the dynamic shared memory; kernels have no other. Aligned so that a tile's swizzle is that of its
// offset.
TC_PTX SharedPtr shared_base() {
  extern __shared__ __align__(1024) char window[];
  return static_cast<SharedPtr>(__cvta_generic_to_shared(window));
}

TC_PTX void barrier() { __syncthreads(); }
TC_PTX void warp_barrier() { __syncwarp(); }

template <class T>
TC_PTX T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(kAllLanes, value, lane_mask);
}

// blockIdx.x and threadIdx.x, read again: what is computed from them does not have to live in registers until then.
TC_PTX unsigned block_anew() {
  unsigned x;
  asm volatile("mov.u32 %0, %%ctaid.x;\n" : "=r"(x));
  return x;
}

// x, which the compiler must take where it stands: what is computed from it is not hoisted out of a loop.
TC_PTX int64_t opaque(int64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}
TC_PTX unsigned thread_anew() {
  unsigned x;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(x));
  return x;
}

TC_PTX bool any(bool predicate) { return __any_sync(kAllLanes, predicate); }

// ---- memory

struct alignas(8) Words2 {
  uint32_t x, y;
};
struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};

// T of 4, 8 or 16 bytes, `p` aligned to its size.
template <class T>
TC_PTX T load_shared(SharedPtr p) {
  return *reinterpret_cast<const T*>(__cvta_shared_to_generic(p));
}
template <class T>
TC_PTX void store_shared(SharedPtr p, T value) {
  *reinterpret_cast<T*>(__cvta_shared_to_generic(p)) = value;
}
template <class T>
TC_PTX T load_global(const void* p) {
  return *static_cast<const T*>(p);
}
template <class T>
TC_PTX void store_global(void* p, T value) {
  *static_cast<T*>(p) = value;
}

// 16 bytes to shared memory without a register in between, or 16 zeros where not `read`. Both addresses are multiples
// of 16. Past the first-level cache, for tiles that other blocks read too.
TC_PTX void cp_async16(SharedPtr to, const void* from, bool read) {
  asm volatile(
      "{\n.reg .pred skip;\n"
      "setp.eq.u32 skip, %2, 0;\n"
      "cp.async.cg.shared.global [%0], [%1], 16, skip;\n}\n" ::"r"(to),
      "l"(from), "r"(static_cast<uint32_t>(read))
      : "memory");
}
// The same for what is read once, a weight in decoding: the second-level cache lets go of it first.
TC_PTX void cp_async16_once(SharedPtr to, const void* from, bool read) {
  asm volatile(
      "{\n.reg .pred skip;\n.reg .b64 policy;\n"
      "setp.eq.u32 skip, %2, 0;\n"
      "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, skip, policy;\n}\n" ::"r"(to),
      "l"(from), "r"(static_cast<uint32_t>(read))
      : "memory");
}
TC_PTX void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most kPending of this thread's groups are on their way. The others' data needs a barrier as well.
template <int kPending>
TC_PTX void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8 × 8 matrices of 16-bit elements. Each lane gives the address of one row of 16 bytes, lanes 0-7 those of matrix
// 0 and so on; lane l gets elements (l / 4, 2 (l % 4)) and the next of each matrix, or those of its transpose.
TC_PTX void ldmatrix_x4(uint32_t (&r)[4], SharedPtr row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
TC_PTX void ldmatrix_x4_transposed(uint32_t (&r)[4], SharedPtr row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// ---- tensor cores. With g = lane / 4 and t = lane % 4 a lane holds, of
//   c [16 × 8]: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
//   a, four registers: rows g, g + 8, g, g + 8; the first two of the first half of k, at 4t (bytes) or 2t (halves)
//   b, two registers: column g; first and second half of k, at the same places

// d = a b + c; a [16 × 32] and b [32 × 8] of int8. Sums in int32 that wrap.
TC_PTX void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int32_t (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};\n"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}
// d += a b; a [16 × 64] of which 2 of 4 neighbours are kept, as [16 × 32] in the registers of mma_s8; b [64 × 8],
// register i at 16 i + 4t. `metadata`: lane (g, t) that of row g + 8 (t % 2), columns 32 (t / 2) to + 31: four bits for
// each four columns, the lower position in the lower two.
TC_PTX void mma_sp_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  asm volatile(
      "mma.sp.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, "
      "{%0, %1, %2, %3}, %12, 0x0;\n"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata));
}
// d += a b; a [16 × 16] and b [16 × 8] of float16 or bfloat16, sums in float32.
TC_PTX void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
TC_PTX void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- arithmetic that the compiler must not fuse or approximate, and some that it should

TC_PTX float from_bits(uint32_t u) { return __uint_as_float(u); }
TC_PTX uint32_t to_bits(float x) { return __float_as_uint(x); }

TC_PTX float half_to_float(uint16_t h) {
  float x;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(x) : "h"(h));
  return x;
}
TC_PTX float bfloat16_to_float(uint16_t b) { return from_bits(static_cast<uint32_t>(b) << 16); }
// Two floats to 16 bits each, half to even.
TC_PTX uint32_t pack_half(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
TC_PTX uint32_t pack_bfloat16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// (a & mask) | bits, one instruction.
TC_PTX uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;\n" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
  return d;
}
// a - b of two float16 or two bfloat16 each.
TC_PTX uint32_t subtract_halves(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("sub.rn.f16x2 %0, %1, %2;\n" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
TC_PTX uint32_t subtract_bfloat16s(uint32_t a, uint32_t b) {
  uint32_t d;
  // 8.0 has no subtraction: a · 1 - b
  asm("{\n.reg .b32 minus;\nneg.bf16x2 minus, %2;\nfma.rn.bf16x2 %0, %1, %3, minus;\n}\n"
      : "=r"(d)
      : "r"(a), "r"(b), "r"(0x3F803F80u));
  return d;
}

TC_PTX float multiply(float a, float b) { return __fmul_rn(a, b); }
TC_PTX float add(float a, float b) { return __fadd_rn(a, b); }
TC_PTX float divide(float a, float b) { return __fdiv_rn(a, b); }
TC_PTX float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
TC_PTX float round_half_even(float x) { return rintf(x); }
TC_PTX int32_t to_int(float x) { return __float2int_rz(x); }
TC_PTX float to_float(int32_t x) { return __int2float_rn(x); }
// Two units in the last place; results below 2^-126 are 0.
TC_PTX float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
// One unit in the last place; of infinity 0.
TC_PTX float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
TC_PTX float log2_approximate(float x) { return __log2f(x); }
// Of two numbers, one NaN: the other.
TC_PTX float maximum(float a, float b) { return fmaxf(a, b); }
TC_PTX float minimum(float a, float b) { return fminf(a, b); }

#undef TC_PTX

}  // namespace tcompress::cuda::ptx
