// A small int8 product with everything that can go wrong in a big one. Each DEFECT_… plants one defect, which the PTX
// emulator has to report: tests/gpu/test_nvcc_emulated.py.
//
//   c [m, n] int32 = a [m, k] · b [n, k]ᵀ, int8; row_max [m, n / 64] the largest of a row in each tile
//   grid (n / 64, ⌈m / 64⌉), 128 threads; k a multiple of 32, n of 64
//
// 1. Two buffers of shared memory; cp.async fills one while mma.sync reads the other. Rows beyond m are filled with 0.
// 2. Row maxima by shuffles within a quad, then over shared memory.
#include <cstdint>

constexpr int kTile = 64, kDepth = 32;
// 48: rows 16-byte aligned, and 8 rows in different banks
constexpr int kStride = 48;

__device__ void copy16(void* to, const void* from, bool inside) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}

template <int kLeft>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

__device__ void multiply(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ unsigned word(const int8_t* p) { return *reinterpret_cast<const unsigned*>(p); }

extern "C" __global__ void __launch_bounds__(128)
    tiled_product(const int8_t* a, const int8_t* b, int* c, int* row_max, int m, int n, int k) {
  __shared__ __align__(16) int8_t tile_a[2][kTile][kStride], tile_b[2][kTile][kStride];
  __shared__ int largest[kTile];
  const int thread = threadIdx.x, warp = thread / 32, group = thread % 32 / 4, within = thread % 4;
  const int row0 = blockIdx.y * kTile, column0 = blockIdx.x * kTile;
  int sums[8][4] = {};

  auto load = [&](int buffer, int start) {
    const int row = thread / 2, at = thread % 2 * 16;
#ifdef DEFECT_BOUND
    const bool inside = row0 + row <= m;
#else
    const bool inside = row0 + row < m;
#endif
#ifdef DEFECT_UNALIGNED
    const int shift = 4;
#else
    const int shift = 0;
#endif
    copy16(&tile_a[buffer][row][at + shift], a + static_cast<int64_t>(row0 + row) * k + start + at, inside);
    copy16(&tile_b[buffer][row][at], b + static_cast<int64_t>(column0 + row) * k + start + at, true);
    asm volatile("cp.async.commit_group;" ::: "memory");
  };

  load(0, 0);
  for (int start = 0, buffer = 0; start < k; start += kDepth, buffer ^= 1) {
    if (start + kDepth < k) {
      load(buffer ^ 1, start + kDepth);
#ifdef DEFECT_WAIT
      wait_copies<2>();
#else
      wait_copies<1>();
#endif
    } else {
      wait_copies<0>();
    }
#ifndef DEFECT_NO_BARRIER_BEFORE
    __syncthreads();
#endif
    unsigned left[4];
    const int8_t* p = &tile_a[buffer][warp * 16 + group][within * 4];
    left[0] = word(p), left[1] = word(p + 8 * kStride), left[2] = word(p + 16), left[3] = word(p + 8 * kStride + 16);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int8_t* q = &tile_b[buffer][j * 8 + group][within * 4];
      const unsigned right[2] = {word(q), word(q + 16)};
      multiply(sums[j], left, right);
    }
#ifndef DEFECT_NO_BARRIER_AFTER
    __syncthreads();
#endif
  }

  const int row = row0 + warp * 16 + group;
  int high[2] = {INT32_MIN, INT32_MIN};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int column = column0 + j * 8 + within * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + 8 * half;
#ifdef DEFECT_MASK
      const bool inside = r <= m;
#else
      const bool inside = r < m;
#endif
      if (inside) {
#ifdef DEFECT_VECTOR
        *reinterpret_cast<int2*>(&c[static_cast<int64_t>(r) * n + column + 1]) =
#else
        *reinterpret_cast<int2*>(&c[static_cast<int64_t>(r) * n + column]) =
#endif
            make_int2(sums[j][2 * half], sums[j][2 * half + 1]);
      }
      high[half] = max(high[half], max(sums[j][2 * half], sums[j][2 * half + 1]));
    }
  }
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#ifdef DEFECT_SHUFFLE
      if (row + 8 * half < m)
#endif
        high[half] = max(high[half], __shfl_xor_sync(0xffffffffu, high[half], distance));
    }
  }
  if (within == 0) {
    largest[warp * 16 + group] = high[0];
#ifndef DEFECT_UNWRITTEN
    largest[warp * 16 + group + 8] = high[1];
#endif
  }
#ifdef DEFECT_DIVERGENT
  if (thread < 48) __syncthreads();
#elif defined(DEFECT_SOME_WARPS)
  if (row0 + warp * 16 < m) __syncthreads();
#else
  __syncthreads();
#endif
  if (thread < kTile && row0 + thread < m) row_max[(row0 + thread) * (n / kTile) + blockIdx.x] = largest[thread];
}
