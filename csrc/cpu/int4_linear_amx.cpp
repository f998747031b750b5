// AMX: tdpbssd multiplies a tile of 16 rows x 64 activations by one of 64 x 16 weights and adds to 16 x 16 sums in 32
// bits. The weights are unpacked to a byte each with their zero already subtracted, so that nothing is left to correct.
// Groups of 32 use tiles of half the depth.
//
// 1. One panel at a time, whose 16 x 16 totals stay in 16 registers over a chunk of K.
// 2. Per span: the sums go through a buffer in the first-level cache to the registers, times the scale. Two buffers
// take
//    turns, so that the next span's tiles need not wait.
//
// Up to 4 rows, and weight-only layers, go to AVX-512. Rows beyond `rows` of the last 16 are read too: the caller's
// buffer has room for them (row_unit). What lies beyond the last step, up to a whole tile, is multiplied by activations
// that are zero.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8")

#include <immintrin.h>

#include "amx_tiles.h"
#include "epilogue.h"
#include "int4_linear.h"
#include "integers.h"
#include "to_float.h"
#include "vec_avx512.h"

namespace tcompress::cpu {
namespace {

constexpr int kMaxRows = kTileRows;
constexpr int64_t kMaxSpanSteps = 8 * kTileSteps;
constexpr int kBatch = 4;  // spans whose tiles are under way together

// Tile numbers are part of the instruction: sums 0 … 3, activations 4 and 5, weights 6 and 7.
#define TC_SPAN(sum, activations, weights)                  \
  _tile_zero(sum);                                          \
  for (int64_t s = 0; s < steps; s += depth) {              \
    _tile_loadd(activations, a + s * kQuad, a_stride);      \
    _tile_loadd(weights, w + s * step_stride, step_stride); \
    _tile_dpbssd(sum, activations, weights);                \
  }                                                         \
  _tile_stored(sum, sums, kPanel * sizeof(int32_t));        \
  break;

inline void multiply(int tile, const int8_t* a, int64_t a_stride, const int8_t* w, int64_t step_stride, int64_t steps,
                     int64_t depth, int32_t* sums) {
  switch (tile) {
    case 0:
      TC_SPAN(0, 4, 6)
    case 1:
      TC_SPAN(1, 5, 7)
    case 2:
      TC_SPAN(2, 4, 6)
    default:
      TC_SPAN(3, 5, 7)
  }
}

#undef TC_SPAN

template <class Scale>
void panel_tile(const Int4TileArgs& args, int64_t depth, int panel) {
  alignas(64) int32_t sums[kBatch][kTileRows * kPanel];
  const int width = args.n_panels * kPanel;
  const int64_t step_stride = width * kQuad;
  const int8_t* a = static_cast<const int8_t*>(args.a);
  const int8_t* w = static_cast<const int8_t*>(args.weights) + panel * kPanel * kQuad;
  const Scale* scales = static_cast<const Scale*>(args.scales) + panel * kPanel;
  float* acc = args.acc + panel * kPanel;
  __m512 total[kTileRows];
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) total[r] = _mm512_setzero_ps();
  int64_t in_group = 0;
  for (int64_t step = 0; step < args.steps;) {
    int spans = 0;
#pragma GCC unroll 4
    for (int i = 0; i < kBatch; ++i) {
      const int64_t at = step + i * args.span_steps;
      if (at >= args.steps) break;
      multiply(i, a + at * kQuad, args.a_stride, w + at * step_stride, step_stride,
               smaller(args.steps - at, args.span_steps), depth, sums[i]);
      ++spans;
    }
    step += spans * args.span_steps;
    for (int i = 0; i < spans; ++i) {
      const __m512 scale = Vec::load(scales).v;
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r)
        total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums[i] + r * kPanel)), scale, total[r]);
      if (++in_group == args.spans_per_group) {
        in_group = 0;
        scales += width;
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r)
    if (r < args.rows) _mm512_storeu_ps(acc + r * width, _mm512_add_ps(total[r], _mm512_loadu_ps(acc + r * width)));
}

template <class Scale>
void unpacked(const Int4TileArgs& args) {
  const int64_t depth = smaller(args.span_steps, kTileSteps);
  const TileConfig config(kTileRows, static_cast<int>(depth));
  _tile_loadconfig(&config);
  for (int p = 0; p < args.n_panels; ++p) panel_tile<Scale>(args, depth, p);
  _tile_release();
}

void unpack(const Int4ChunkArgs& args) {
  const int width = args.n_panels * kPanel;
  const int64_t pair_bytes = width * kQuad;
  const __m512i low = _mm512_set1_epi8(15);
  int8_t* out = static_cast<int8_t*>(args.out);
  for (int64_t step = 0; step < args.steps; step += 2, out += 2 * pair_bytes)
    for (int p = 0; p < args.n_panels; ++p) {
      __m512i zeros = _mm512_set1_epi8(kSymmetricZero);
      if (args.zero_points != nullptr) {
        const uint8_t* of_panel = args.zero_points + step / args.group_steps * width + p * kPanel;
        const __m512i lanes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(of_panel)));
        zeros = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(0x01010101));
      }
      const __m512i both = _mm512_loadu_si512(args.weights + step / 2 * pair_bytes + p * kPanel * kQuad);
      const __m512i first = _mm512_and_si512(both, low), second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
      _mm512_storeu_si512(out + p * kPanel * kQuad, _mm512_sub_epi8(first, zeros));
      _mm512_storeu_si512(out + pair_bytes + p * kPanel * kQuad, _mm512_sub_epi8(second, zeros));
    }
}

// AVX-512 takes 8 rows at a time.
template <class Scale>
void float_unpacked(const Int4TileArgs& args) {
  constexpr int kRows = 8;
  Int4TileArgs part = args;
  for (int r = 0; r < args.rows; r += kRows) {
    part.rows = args.rows - r < kRows ? args.rows - r : kRows;
    part.a = static_cast<const char*>(args.a) + r * args.a_stride;
    part.acc = args.acc + r * args.n_panels * kPanel;
    kInt4LinearAvx512Vnni.float_unpacked[sizeof(Scale) == sizeof(Float16)](part);
  }
}

void corrections(const int8_t* a, int64_t steps, int64_t span_steps, bool has_zero_points, int32_t* out) {
  kInt4LinearAvx512Vnni.corrections(a, steps, span_steps, has_zero_points, out);
}

template <class Scale>
void packed(const Int4TileArgs& args) {
  kInt4LinearAvx512Vnni.packed[sizeof(Scale) == sizeof(Float16)](args);
}

template <class Scale>
void float_packed(const Int4TileArgs& args) {
  kInt4LinearAvx512Vnni.float_packed[sizeof(Scale) == sizeof(Float16)](args);
}

void float_unpack(const Int4ChunkArgs& args) { kInt4LinearAvx512Vnni.float_unpack(args); }

}  // namespace

const Int4LinearPath kInt4LinearAmx = {kMaxRows,
                                       4,
                                       kTileRows,
                                       300,
                                       24,
                                       kMaxSpanSteps,
                                       quantize_row_avx512,
                                       corrections,
                                       {packed<float>, packed<Float16>},
                                       {unpacked<float>, unpacked<Float16>},
                                       {float_packed<float>, float_packed<Float16>},
                                       {float_unpacked<float>, float_unpacked<Float16>},
                                       unpack,
                                       float_unpack,
                                       row_to_float<Vec>,
                                       float_epilogue_for<Vec>};

}  // namespace tcompress::cpu

#endif  // __x86_64__
