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

struct Dot : Bytes256 {
  static Sum multiply_add(Sum s, A a, __m256i w) { return _mm256_dpbusd_avx_epi32(s, a, w); }
};

template <int kTokens>
struct Int4Dot {
  static constexpr int kChains = dot_chains(kTokens);
  static void add_four(__m256i (&sum)[kChains], const __m256i (&w)[kFour], const uint32_t* a,
                       const uint32_t* positions) {
#pragma GCC unroll 4
    for (int b = 0; b < kFour; ++b)
      sum[b % kChains] = _mm256_dpbusd_avx_epi32(sum[b % kChains], w[b], broadcast_256(a + positions[b]));
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
