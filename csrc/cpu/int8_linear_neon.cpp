// NEON with the dot-product extension (ARMv8.2): sdot adds four s8 * s8 products to a 32-bit lane, exact for every
// operand, 16 MAC an instruction. Both schemes fit s8 as they are: symmetric -127 … 127, asymmetric 0 … 127.
//
// One register holds four steps of a row; the instruction picks a step by its lane number, so activations need no
// broadcast. 32 registers: 24 sums, six rows of activations, weights.
#if defined(__aarch64__)
#pragma GCC target("arch=armv8.2-a+dotprod")

#include <arm_neon.h>

#include "epilogue.h"
#include "int8_linear.h"
#include "int8_panel_tile.h"
#include "vec_neon.h"

namespace tcompress::cpu {
namespace {

constexpr int kMaxRows = 5 * kTileRows;
static_assert(kMaxRows <= kMaxTileRows);
constexpr int kOutputs = 4;                  // of a register
constexpr int kColumns = kPanel / kOutputs;  // registers of a panel
constexpr int kLaneSteps = 4;                // steps of a row in a register
static_assert(kOutputs * kQuad == sizeof(int8x16_t) && kLaneSteps * kQuad == sizeof(int8x16_t));

// One step: lane kLane of each row's activations.
template <int kLane, int kRows, int kWidth>
__attribute__((always_inline)) inline void multiply(const int8_t* weights, const int8x16_t (&a)[kRows],
                                                    int32x4_t (&sum)[kRows][kWidth]) {
#pragma GCC unroll 12
  for (int c = 0; c < kWidth; ++c) {
    const int8x16_t w = vld1q_s8(weights + c * kOutputs * kQuad);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) sum[r][c] = vdotq_laneq_s32(sum[r][c], w, a[r], kLane);
  }
}

template <int kRows, int kPanels>
void tile(const PanelTileArgs& args) {
  constexpr int kWidth = kPanels * kColumns;
  int32x4_t sum[kRows][kWidth];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 12
    for (int c = 0; c < kWidth; ++c) sum[r][c] = vdupq_n_s32(0);

  int8x16_t a[kRows];
  const int8_t* w = args.weights;
  int64_t i = 0;
  for (; i + kLaneSteps <= args.steps; i += kLaneSteps, w += kLaneSteps * args.step_bytes) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) a[r] = vreinterpretq_s8_u8(vld1q_u8(args.a + r * args.a_stride + i * kQuad));
    multiply<0>(w, a, sum);
    multiply<1>(w + args.step_bytes, a, sum);
    multiply<2>(w + 2 * args.step_bytes, a, sum);
    multiply<3>(w + 3 * args.step_bytes, a, sum);
  }
  for (; i < args.steps; ++i, w += args.step_bytes) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      int32_t quad;
      __builtin_memcpy(&quad, args.a + r * args.a_stride + i * kQuad, sizeof(quad));
      a[r] = vreinterpretq_s8_s32(vdupq_n_s32(quad));
    }
    multiply<0>(w, a, sum);
  }

#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 12
    for (int c = 0; c < kWidth; ++c) vst1q_s32(args.acc + r * args.acc_stride + c * kOutputs, sum[r][c]);
}

constexpr PanelTiles kTiles = {
    tile<4, 1>, tile<5, 1>, tile<6, 1>, {{tile<1, 1>, tile<1, 2>, tile<1, 3>}, {tile<2, 1>, tile<2, 2>, tile<2, 3>}}};

void tile_any(const Int8TileArgs& args) { run_panel_tiles(args, kTiles); }

}  // namespace

// 25 MAC a cycle: two instructions of 16 at four fifths; not measured.
const Int8LinearPath kInt8LinearNeon = {kMaxRows, kTileRows,        25, 0, 0, quantize_row_neon, tile_any,
                                        tile_any, epilogue_for<Vec>};

}  // namespace tcompress::cpu

#endif  // __aarch64__
