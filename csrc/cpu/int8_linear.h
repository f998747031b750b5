// y = activation(x W^T + bias) with an int8 weight and activations quantized per token on the way in.
//
//   acc[m,n] = sum_k (a[m,k] - zero_point[m]) * w[n,k]                       exact in int32
//   y[m,n]   = activation(float(acc) * scale[m] * weight_scale[n] + bias[n]) * factor[m,n] + residual[m,n]
//
// a, scale and zero_point come from quantize_row.h. Constraint: K <= kMaxK, so that neither the
// sum nor a partial sum leaves int32.
//
// Kernel layout of the weight, one for all paths, zero padded: outputs in panels of 16, three panels to a group (the
// last group may have one or two), K in steps of four; then the column sums; then the flush schedule.
//
//   [N/48][K/4][3][16][4] int8
//     n0: k0 k1 k2 k3 | n1: k0 k1 k2 k3 | … | n15 || n16 … n31 || n32 … n47     <- one step: 6 ymm, 3 zmm
//   [N/16*16] int32   sum_k w[n,k]
//   [N/48][K/4] uint8 lengths of the runs of steps that may be summed in 16 bits, closed by a zero (flush_schedule.h);
//                     zeros up to a multiple of four bytes
#pragma once

#include <cstdint>

#include "activation_kind.h"
#include "dtype.h"
#include "linear_grid.h"
#include "path_kind.h"
#include "quantize_per_token.h"

namespace tcompress::cpu {

// |a - zero_point| and the offset-128 form of a are at most 255, |w| at most 128.
constexpr int64_t kMaxK = 65536;
static_assert(kMaxK * 255 * 128 <= 2147483647, "a partial sum must fit in int32");

// Where the parts of the kernel layout begin, in bytes.
struct Int8KernelLayout {
  int64_t n_panels, steps, n_groups;
  int64_t column_sums, schedules, bytes;

  Int8KernelLayout(int64_t n, int64_t k);

  // The group that starts at `panel`, a multiple of kGroupPanels.
  int64_t group(int64_t panel) const { return panel * kPanel * steps * kQuad; }
  int64_t schedule(int64_t panel) const { return schedules + panel / kGroupPanels * steps; }
};

// weight [N, K] int8, contiguous -> kernel layout
void int8_prepack(const int8_t* weight, int64_t n, int64_t k, int8_t* kernel_weight, int num_threads);

// The inverse, for the given rows, each in [0, n), or for all where rows is null: weight [n_rows, K].
void int8_unpack(const int8_t* kernel_weight, int64_t n, int64_t k, const int64_t* rows, int64_t n_rows, int8_t* weight,
                 int num_threads);

// Activations that are quantized already (QuantizePerTokenArgs); they take the place of x where q is not null.
struct QuantizedInput {
  const uint8_t* q = nullptr;           // [M, K], int8 where symmetric
  const float* scale = nullptr;         // [M]
  const int32_t* zero_point = nullptr;  // [M]; not read where symmetric
};

struct Int8LinearArgs {
  const void* x;  // [M, K], contiguous
  DType x_dtype;
  int64_t m, n, k;
  const int8_t* kernel_weight;
  const float* weight_scale;  // [N]
  const float* bias;          // [N] or null
  int act_bits;               // 2 … 8
  bool act_symmetric;         // asymmetric: at most 7 bits, so that a fits both int8 and uint8
  Activation activation;
  const void* residual;  // [M, N] like y, or null; may be y itself
  void* y;               // [M, N], contiguous
  DType y_dtype;         // kInt32 stores acc itself; scales, bias, activation and residual then do not apply
  QuantizedInput input = {};
  const FixedScale* fixed = nullptr;  // of x, or each token has its own
};

void int8_linear(const Int8LinearArgs& args, int num_threads);

// The result in float32, quantized per token for a following int8 layer: out.x, out.dtype, out.m and out.k are not
// read.
void int8_linear_requantize(const Int8LinearArgs& args, const QuantizePerTokenArgs& out, int num_threads);

// Several weights [N_i, K] over one x, which is quantized once: all parts have the first one's x, m, k, act_bits,
// act_symmetric and y_dtype. Gated: two parts with the same n; y_0 = part_0 * part_1, and part_1's y is not used.
void int8_multi_linear(const Int8LinearArgs* parts, int count, bool gated, int num_threads);

// ---- what a path provides -------------------------------------------------------------------------------------------

struct Int8TileArgs {
  const uint8_t* a;  // rows of `steps` quads
  int64_t a_stride;
  int rows;               // 1 … max_rows
  const int8_t* weights;  // a group
  int n_panels;           // its panels: 1 … kGroupPanels
  int64_t steps;          // K/4
  const uint8_t* runs;    // its flush schedule
  int32_t* acc;           // [rows][n_panels * kPanel], sum_k a*w, the zero point not yet subtracted
  bool accumulate;        // add to acc; only where the path has chunk_steps
};

// `rows` rows of n columns each.
struct EpilogueArgs {
  int32_t* acc;  // [rows][acc_stride], padded to a whole panel; overwritten
  int64_t acc_stride;
  int64_t rows, n;
  const int32_t* zero_point;  // [rows]
  const float* scale;         // [rows]
  const int32_t* column_sum;  // [n], padded to a whole panel
  const float* weight_scale;  // [n]
  const float* bias;          // [n] or null
  int64_t y_stride;           // elements from row to row of factor, residual and y
  const void* factor;         // or null
  const void* residual;       // or null
  void* y;
};

struct Int8LinearPath {
  int max_rows;            // rows of a tile call
  int row_unit;            // rows of a register tile: threads split M, and buffers are made, in multiples of it
  int macs_per_cycle;      // about what the tiles reach; only the split over threads depends on it
  int64_t chunk_steps;     // steps that all row tiles pass over before the next: their weights fit the L1; 0: all of K
  uint8_t symmetric_flip;  // 0x80 where the multiplier wants unsigned activations; the zero point is then 128
  QuantizeRow quantize_row;
  void (*tile_signed)(const Int8TileArgs&);    // symmetric activations
  void (*tile_unsigned)(const Int8TileArgs&);  // asymmetric activations, 0 … 127
  void (*(*epilogue)(Activation, DType))(const EpilogueArgs&);
};

extern const Int8LinearPath kInt8LinearScalar, kInt8LinearAvx2, kInt8LinearAvxVnni, kInt8LinearAvx512Vnni,
    kInt8LinearAmx, kInt8LinearNeon;

}  // namespace tcompress::cpu
