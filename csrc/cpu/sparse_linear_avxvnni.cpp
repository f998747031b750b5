// AVX-VNNI: vpdpbusd in ymm registers, exact for every operand. It wants unsigned activations: symmetric ones are
// stored with an offset of 128, which the epilogue takes out as a zero point.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avxvnni")

#include "epilogue.h"
#include "int4_sparse_decode_avx2.h"
#include "int4_sparse_tile.h"
#include "int4_sparse_unpack_avx2.h"
#include "sparse_decode.h"
#include "sparse_gather_avx2.h"
#include "sparse_linear.h"
#include "sparse_multiply_avx2.h"
#include "sparse_tile.h"
#include "to_float.h"
#include "transpose_units_avx2.h"
#include "vec_avx2.h"

namespace tcompress::cpu {
namespace {

// As assembly but where it is emulated, because GCC 12 copies every sum twice around the instruction.
inline void dot_256(__m256i& sum, __m256i a, __m256i w) {
#ifndef SIMDE_VERSION
  asm("%{vex%} vpdpbusd %[w], %[a], %[s]" : [s] "+x"(sum) : [a] "x"(a), [w] "x"(w));
#else
  sum = _mm256_dpbusd_avx_epi32(sum, a, w);
#endif
}

struct Dot : Bytes256 {
  static Sum multiply_add(Sum s, A a, __m256i w) {
    dot_256(s, a, w);
    return s;
  }
};

struct Int4Dot {
  static void add_four(__m256i& sum, const __m256i (&w)[kFour], const uint32_t* a, const uint32_t* positions) {
#pragma GCC unroll 4
    for (int b = 0; b < kFour; ++b) dot_256(sum, w[b], broadcast_256(a + positions[b]));
  }
};

constexpr SparseKernels kBytes = {{tile_one_any<Dot>, tile_eight<Dot, 4, 3>},
                                  {decode_gather_any<Dot>, decode_eight_any<Dot>}};

}  // namespace

const SparseLinearPath kSparseLinearAvxVnni = {
    Bytes256::kLanes,
    8,
    0x80,
    quantize_row_avx2,
    row_to_float<Vec>,
    transpose_units,
    kBytes,
    kBytes,
    {{tile_one_any<Floats256>, tile_eight<Floats256, 4, 3>},
     {decode_gather_any<Floats256>, decode_eight_any<Floats256>}},
    {0x80, int4_unpack<UnsignedUnpacker<false>>, int4_tile<Dot, 4, 3>, int4_decode_any<Int4Dot>},
    epilogue_for<Vec>,
    float_epilogue_for<Vec>};

}  // namespace tcompress::cpu

#endif  // __x86_64__
