// AVX-512 VNNI: vpdpbusd in zmm registers (int8_linear_avx512vnni.cpp), vpexpandd for few tokens.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

#include <immintrin.h>

#include "epilogue.h"
#include "int4_sparse_decode_avx512.h"
#include "int4_sparse_tile.h"
#include "int4_sparse_unpack_avx2.h"
#include "sparse_decode.h"
#include "sparse_linear.h"
#include "sparse_multiply_avx2.h"
#include "sparse_tile.h"
#include "to_float.h"
#include "transpose_units_avx2.h"
#include "vec_avx512.h"

namespace tcompress::cpu {
namespace {

// The form that takes the units as they lie would read no more than it needs, but is microcoded on Zen 4.
inline __m512i spread_512(const uint32_t* p, uint32_t bits) {
  return _mm512_maskz_expand_epi32(static_cast<__mmask16>(bits), _mm512_loadu_si512(p));
}

// As assembly but where it is emulated, because GCC 12 copies every sum twice around the instruction.
inline void dot_512(__m512i& sum, __m512i a, __m512i w) {
#ifndef SIMDE_VERSION
  asm("vpdpbusd %[w], %[a], %[s]" : [s] "+v"(sum) : [a] "v"(a), [w] "v"(w));
#else
  sum = _mm512_dpbusd_epi32(sum, a, w);
#endif
}

inline void dot_256(__m256i& sum, __m256i a, __m256i w) {
#ifndef SIMDE_VERSION
  asm("vpdpbusd %[w], %[a], %[s]" : [s] "+v"(sum) : [a] "v"(a), [w] "v"(w));
#else
  sum = _mm256_dpbusd_epi32(sum, a, w);
#endif
}

struct Bytes512 {
  static constexpr bool kRounds = false;
  static constexpr int kLanes = 16;
  using Sum = __m512i;
  using A = __m512i;
  static Sum zero() { return _mm512_setzero_si512(); }
  static Sum add(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
  static Sum load_sum(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static void store_sum(uint32_t* p, Sum s) { _mm512_storeu_si512(p, s); }
  static A load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static __m512i broadcast(const uint32_t* p) { return _mm512_set1_epi32(static_cast<int32_t>(*p)); }
  static Sum start(const uint32_t* p) { return broadcast(p); }
  static __m512 load_scale(const float* p) { return _mm512_set1_ps(*p); }
  static void add_scaled(float* acc, Sum s, __m512 scale) {
    _mm512_storeu_ps(acc, _mm512_fmadd_ps(_mm512_cvtepi32_ps(s), scale, _mm512_loadu_ps(acc)));
  }
  static __m512i spread(const uint32_t* p, uint32_t bits) { return spread_512(p, bits); }
  static Sum multiply_add(Sum s, A a, __m512i w) {
    dot_512(s, a, w);
    return s;
  }
  static void store_total(uint32_t* p, Sum a, Sum b) {
    *p = static_cast<uint32_t>(_mm512_reduce_add_epi32(_mm512_add_epi32(a, b)));
  }
};

struct Floats512 {
  static constexpr bool kRounds = true;
  static constexpr int kLanes = 16;
  using Sum = __m512;
  using A = __m512;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  static Sum load_sum(const uint32_t* p) { return _mm512_loadu_ps(p); }
  static void store_sum(uint32_t* p, Sum s) { _mm512_storeu_ps(p, s); }
  static A load(const uint32_t* p) { return _mm512_loadu_ps(p); }
  static __m512 broadcast(const uint32_t* p) {
    return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int32_t>(*p)));
  }
  static __m512 spread(const uint32_t* p, uint32_t bits) { return _mm512_castsi512_ps(spread_512(p, bits)); }
  static Sum multiply_add(Sum s, A a, __m512 w) { return _mm512_fmadd_ps(a, w, s); }
  static void store_total(uint32_t* p, Sum a, Sum b) {
    *reinterpret_cast<float*>(p) = _mm512_reduce_add_ps(_mm512_add_ps(a, b));
  }
};

// Outputs as lanes: a block is half a zmm.
struct Dot256 : Bytes256 {
  static Sum multiply_add(Sum s, A a, __m256i w) {
    dot_256(s, a, w);
    return s;
  }
};

struct Dot512 {
  static void dot(__m512i& sum, __m512i a, __m512i w) { dot_512(sum, a, w); }
};

constexpr SparseKernels kBytes = {{tile_one_any<Bytes512>, tile_eight<Bytes512, 8, 3>},
                                  {decode_one_any<Bytes512>, decode_eight_any<Dot256>}};

}  // namespace

const SparseLinearPath kSparseLinearAvx512Vnni = {
    Bytes512::kLanes,
    4,
    0x80,
    quantize_row_avx512,
    row_to_float<Vec>,
    transpose_units,
    kBytes,
    kBytes,
    {{tile_one_any<Floats512>, tile_eight<Floats512, 8, 3>}, {decode_one_any<Floats512>, decode_eight_any<Floats256>}},
    {0x80, int4_unpack<UnsignedUnpacker<false>>, int4_tile<Bytes512, 8, 3>, int4_decode_quarters_any<Dot512>},
    epilogue_for<Vec>,
    float_epilogue_for<Vec>};

}  // namespace tcompress::cpu

#endif  // __x86_64__
