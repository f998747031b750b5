// AVX2: int4_tile_avx2.h for quantized activations, int4_float_tile_avx2.h for weight-only.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")

#include <immintrin.h>

#include "epilogue.h"
#include "int4_float_tile_avx2.h"
#include "int4_linear.h"
#include "int4_tile16_avx2.h"
#include "int4_tile_avx2.h"
#include "to_float.h"
#include "vec_avx2.h"

namespace tcompress::cpu {
namespace {

constexpr int kMaxRows = kFloatRows;
constexpr int kPackedRows = 4;

template <class Scale>
void packed(const Int4TileArgs& args) {
  using Tile = void (*)(const Int4TileArgs&, int);
  static constexpr Tile kTiles[kPackedRows] = {tile<1, true, Scale>, tile<2, true, Scale>, tile<3, true, Scale>,
                                               tile<4, true, Scale>};
  kTiles[args.rows - 1](args, 0);
}

template <class Scale>
void unpacked(const Int4TileArgs& args) {
  int r = 0;
  if (args.n_panels == kGroupPanels)
    for (; r + 2 <= args.rows; r += 2) tile16<Scale>(args, r);
  for (; r + 2 <= args.rows; r += 2) tile<2, false, Scale>(args, r);
  if (r < args.rows) tile<1, false, Scale>(args, r);
}

}  // namespace

const Int4LinearPath kInt4LinearAvx2 = {kMaxRows,
                                        kPackedRows,
                                        2,
                                        32,
                                        12,
                                        kSpanSteps,
                                        quantize_row_avx2,
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
