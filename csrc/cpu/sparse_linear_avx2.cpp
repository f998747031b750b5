// AVX2. Asymmetric activations (0 … 127) are summed in 16 bits (sparse_tile16_avx2.h); symmetric ones take
// |w| u8 * (a with the sign of w) s8, widened at every step. Neither pair sum saturates: 2 * 127 * 128 = 32512.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")

#include "epilogue.h"
#include "int4_sparse_decode_avx2.h"
#include "int4_sparse_tile.h"
#include "int4_sparse_unpack_avx2.h"
#include "sparse_decode.h"
#include "sparse_gather_avx2.h"
#include "sparse_linear.h"
#include "sparse_multiply_avx2.h"
#include "sparse_tile.h"
#include "sparse_tile16_avx2.h"
#include "to_float.h"
#include "transpose_units_avx2.h"
#include "vec_avx2.h"

namespace tcompress::cpu {
namespace {

struct Unsigned : Bytes256 {
  static Sum multiply_add(Sum s, A a, __m256i w) {
    return _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_maddubs_epi16(a, w), _mm256_set1_epi16(1)));
  }
};

struct Signed : Bytes256 {
  static Sum multiply_add(Sum s, A a, __m256i w) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
    return _mm256_add_epi32(s, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

// Four blocks' pairs fit 16 bits: 4 * 2 * 15 * 127 = 15240.
struct Int4Pairs {
  static void add_four(__m256i& sum, const __m256i (&w)[kFour], const uint32_t* a, const uint32_t* positions) {
    __m256i pairs = _mm256_maddubs_epi16(w[0], broadcast_256(a + positions[0]));
#pragma GCC unroll 3
    for (int b = 1; b < kFour; ++b)
      pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w[b], broadcast_256(a + positions[b])));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

}  // namespace

const SparseLinearPath kSparseLinearAvx2 = {
    Bytes256::kLanes,
    8,
    0,
    quantize_row_avx2,
    row_to_float<Vec>,
    transpose_units,
    {{tile_one_any<Signed>, tile_eight<Signed, 4, 2>}, {decode_gather_any<Signed>, decode_eight_any<Signed>}},
    {{tile16_one_any, tile16_eight}, {decode_gather_any<Unsigned>, decode_eight_any<Unsigned>}},
    {{tile_one_any<Floats256>, tile_eight<Floats256, 4, 3>},
     {decode_gather_any<Floats256>, decode_eight_any<Floats256>}},
    {0x80, int4_unpack<UnsignedUnpacker<true>>, int4_tile<Pairs16, 4, 2>, int4_decode_any<Int4Pairs>},
    epilogue_for<Vec>,
    float_epilogue_for<Vec>};

}  // namespace tcompress::cpu

#endif  // __x86_64__
