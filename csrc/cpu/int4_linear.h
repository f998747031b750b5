// y = activation(x W^T + bias) * factor + residual with a 4-bit weight in groups along K.
//
//   W[n,k] = (w[n,k] - zero[n,g]) * weight_scale[n,g],   w in 0 … 15,   g = k / group_size
//
// With quantized activations (a, scale and zero_point from quantize_per_token; a' = a - zero_point fits int8):
//
//   acc[m,n,g] = sum_{k in g} a'[m,k] * (w[n,k] - zero[n,g])                       exact in int32
//   y[m,n]     = activation(sum_g float(acc) * weight_scale[n,g] * scale[m] + bias[n]) …
//
// Weight-only: x in float32 takes the place of a', and scale is 1.
//
// Kernel layout of the weight, one for all paths: outputs in panels of 16, three panels to a group (the last group may
// have one or two), K in pairs of steps of four, zero padded to a multiple of 32.
//
//   [N/48][K/8][3][16][4] bytes      low nibble: k = 8i + j, high nibble: k = 8i + 4 + j, j = 0 … 3
//     n0: k0|k4 k1|k5 k2|k6 k3|k7 | n1 … n15 || n16 … n31 || n32 … n47      <- two steps: 3 zmm
//   [N/48][K/g][3][16] float16 or float32   scales
//   [N/48][K/g][3][16] uint8                zero points; absent where all are 8
#pragma once

#include <cstdint>

#include "activation_kind.h"
#include "dtype.h"
#include "linear_grid.h"
#include "path_kind.h"
#include "quantize_per_token.h"

namespace tcompress::cpu {

constexpr int kSymmetricZero = 8;  // stored weight that means 0, where there are no zero points
constexpr int64_t kInt4PadK = 32;
constexpr int64_t kMaxInt4K = 65536;
static_assert(kMaxInt4K * 127 * 15 <= 2147483647, "a sum over one group must fit in int32");

// Where the parts of the kernel layout begin, in bytes.
struct Int4KernelLayout {
  int64_t n_panels, steps, n_k_groups;
  int64_t group_steps;  // of a scale, all of K where the scale is per channel
  int64_t scale_bytes;  // of one scale
  int64_t scales, zero_points, bytes;

  // group_size: a power of two from 32 to 512, or at least k.
  Int4KernelLayout(int64_t n, int64_t k, int64_t group_size, DType scale_dtype, bool has_zero_points);

  // The group of panels that starts at `panel`, a multiple of kGroupPanels; `columns` is its width.
  int64_t weights_at(int64_t panel) const { return panel * kPanel * steps * kQuad / 2; }
  int64_t scales_at(int64_t panel) const { return scales + panel * kPanel * n_k_groups * scale_bytes; }
  int64_t zero_points_at(int64_t panel) const { return zero_points + panel * kPanel * n_k_groups; }
};

struct Int4PrepackArgs {
  const uint8_t* weight;  // [N, ceil(K/2)], the even k in the low nibble
  int64_t n, k, group_size;
  const void* scale;          // [N, ceil(K/group_size)]
  DType scale_dtype;          // kFloat16 or kFloat32
  const uint8_t* zero_point;  // like scale, or null
};

void int4_prepack(const Int4PrepackArgs& args, int8_t* kernel_weight, int num_threads);

// The inverse: fills weight, scale and zero_point from the kernel layout.
struct Int4UnpackArgs {
  const int8_t* kernel_weight;
  int64_t n, k, group_size;
  DType scale_dtype;
  bool has_zero_points;
  uint8_t* weight;
  void* scale;
  uint8_t* zero_point;
};

void int4_unpack(const Int4UnpackArgs& args, int num_threads);

struct Int4LinearArgs {
  const void* x;  // [M, K], contiguous
  DType x_dtype;
  int64_t m, n, k, group_size;
  const int8_t* kernel_weight;
  DType scale_dtype;
  bool has_zero_points;
  const float* bias;   // [N] or null
  int act_bits;        // 2 … 8, or 0: weight-only
  bool act_symmetric;  // asymmetric: at most 7 bits, so that a - zero_point fits int8
  Activation activation;
  const void* residual;  // [M, N] like y, or null; may be y itself
  void* y;               // [M, N], contiguous
  DType y_dtype;
};

void int4_linear(const Int4LinearArgs& args, int num_threads);

// Several weights [N_i, K] over one x, which is quantized once: all parts have the first one's x, m, k, group_size,
// act_bits, act_symmetric, has_zero_points and y_dtype. Gated: two parts with the same n; y_0 = part_0 * part_1, and
// part_1's y is not used.
void int4_multi_linear(const Int4LinearArgs* parts, int count, bool gated, int num_threads);

// ---- what a path provides -------------------------------------------------------------------------------------------

// A span is a run of steps that are summed without a flush to floating point; it lies within one scale group.
struct Int4TileArgs {
  const void* a;        // rows of int8 quads, or of floats, 4 a step
  int64_t a_stride;     // bytes
  int rows;             // 1 … max_rows (packed: 1 … max_packed_rows)
  const void* weights;  // packed: kernel layout; unpacked: [steps][panels][16][4] uint8, or [4*steps][panels][16] float
  int n_panels;
  int64_t steps;       // of this chunk: a multiple of 8
  int64_t span_steps;  // the last span may be shorter, by a multiple of 8
  int64_t spans_per_group;
  const int32_t* corrections;  // [rows][correction_stride], a word a span; integers only
  int64_t correction_stride;
  const void* scales;          // [K/g][panels][16], from this chunk on
  const uint8_t* zero_points;  // likewise, or null
  float* acc;                  // [rows][n_panels * 16], added to
};

using Int4Tile = void (*)(const Int4TileArgs&);

// `rows` rows of n columns each.
struct FloatEpilogueArgs {
  const float* acc;  // [rows][acc_stride], padded to a whole panel
  int64_t acc_stride;
  int64_t rows, n;
  const float* scale;    // [rows]
  const float* bias;     // [n] or null
  int64_t y_stride;      // elements from row to row of factor, residual and y
  const void* factor;    // or null
  const void* residual;  // or null
  void* y;
};

struct Int4ChunkArgs {
  const uint8_t* weights;  // kernel layout
  int n_panels;
  int64_t steps;               // even
  int64_t group_steps;         // floats only
  const uint8_t* zero_points;  // floats only: subtracted; null means 8
  void* out;                   // as Int4TileArgs.weights
};

struct Int4LinearPath {
  int max_rows, max_packed_rows;
  int row_unit;
  double macs_per_cycle, float_macs_per_cycle;
  int64_t max_span_steps;
  QuantizeRow quantize_row;
  // Sums of a over each span: a word a span, in the form that the tile starts its sums with. Without zero points it is
  // multiplied by -8, else by -1 (the tile multiplies by the zero points).
  void (*corrections)(const int8_t* a, int64_t steps, int64_t span_steps, bool has_zero_points, int32_t* out);
  Int4Tile packed[2], unpacked[2];  // [scales are float16]
  Int4Tile float_packed[2], float_unpacked[2];
  void (*unpack)(const Int4ChunkArgs&);
  void (*float_unpack)(const Int4ChunkArgs&);
  void (*to_float)(const void* x, DType dtype, int64_t k, float* out);
  void (*(*epilogue)(Activation, DType))(const FloatEpilogueArgs&);
};

extern const Int4LinearPath kInt4LinearScalar, kInt4LinearAvx2, kInt4LinearAvx512Vnni, kInt4LinearAmx;

}  // namespace tcompress::cpu
