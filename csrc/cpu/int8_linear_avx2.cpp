// AVX2: vpmaddubsw multiplies unsigned by signed bytes and adds neighbours in 16 bits, vpmaddwd by ones widens to 32.
// Three tiles, all exact:
//
// 1. symmetric activations (-127 … 127): |w| u8 * (a with the sign of w) s8, widened at every step
// 2. asymmetric (0 … 127):               a u8 * w s8, widened at every step: 32 MAC a cycle at most
// 3. asymmetric, whole groups with a flush schedule: sums stay in 16 bits for a run of steps (int8_tile16_avx2.h)
//
// The pair sum of 1 and 2 is at most 2*127*128 = 32512 < 32768: it never saturates, w = -128 included.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")

#include <immintrin.h>

#include "epilogue.h"
#include "int8_linear.h"
#include "int8_tile16_avx2.h"
#include "int8_tile_avx2.h"
#include "vec_avx2.h"

namespace tcompress::cpu {
namespace {

constexpr int kMaxRows = 32;
constexpr int kUnsignedRows = 6, kSignedRows = 4;
static_assert(kMaxRows <= kMaxTileRows);

using TileColumn = void (*)(const PanelTileArgs&);
constexpr TileColumn kUnsigned[kUnsignedRows] = {tile_unsigned<1>, tile_unsigned<2>, tile_unsigned<3>,
                                                 tile_unsigned<4>, tile_unsigned<5>, tile_unsigned<6>};
constexpr TileColumn kSigned[kSignedRows] = {tile_signed<1>, tile_signed<2>, tile_signed<3>, tile_signed<4>};

// Cuts a group into panels and the rows into what a register tile takes.
template <int kTileRows>
void tile_panels(const Int8TileArgs& args, const TileColumn (&tiles)[kTileRows]) {
  const int64_t step_bytes = args.n_panels * kPanel * kQuad;
  for (int p = 0; p < args.n_panels; ++p)
    for (int r = 0; r < args.rows; r += kTileRows) {
      const int rows = args.rows - r < kTileRows ? args.rows - r : kTileRows;
      tiles[rows - 1]({args.a + r * args.a_stride, args.a_stride, args.weights + p * kPanel * kQuad, step_bytes,
                       args.steps, args.acc + (r * args.n_panels + p) * kPanel, args.n_panels * kPanel});
    }
}

void signed_any(const Int8TileArgs& args) { tile_panels(args, kSigned); }

void unsigned_any(const Int8TileArgs& args) {
  if (args.n_panels == kGroupPanels && args.steps > 0 && args.runs[0] != 0)
    tile16(args);
  else
    tile_panels(args, kUnsigned);
}

}  // namespace

const Int8LinearPath kInt8LinearAvx2 = {kMaxRows,     kUnsignedRows,    32, 0, 0, quantize_row_avx2, signed_any,
                                        unsigned_any, epilogue_for<Vec>};

}  // namespace tcompress::cpu

#endif  // __x86_64__
