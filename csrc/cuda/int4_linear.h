// int4 linear layer with activations in 16-bit floats (W4A16) on CUDA: the contract of int4_linear.cuh. Free of torch.
#pragma once

#include <cstdint>

#include "../cpu/activation_kind.h"
#include "../cpu/dtype.h"
#include "int8_linear.h"

namespace tcompress::cuda {

// A unit of the kernel's weight: this many columns and steps of k, 16 bytes a lane of a warp.
constexpr int kInt4Columns = 32, kInt4Steps = 32, kInt4UnitBytes = 512;

// Sizes of the kernel's weight: [N / 32][K / 32][lane 32][column tile of eight, 4] words, then scales and zero points.
//   word of lane (g = lane / 4, t = lane % 4) and column tile j: column 8 j + g; nibble i, k:
//     0: 2t   1: 2t + 8   2: 2t + 16   3: 2t + 24     4: 2t + 1   5: 2t + 9   6: 2t + 17   7: 2t + 25
//   so that a mask of the lowest nibble of each half gives two neighbours of k, one register of the product's fragment,
//   and three shifts by four the others.
struct Int4Layout {
  int64_t columns, steps, groups, scale, zero, bytes;

  constexpr Int4Layout(int64_t n, int64_t k, int64_t group)
      : columns((n + kInt4Columns - 1) / kInt4Columns * kInt4Columns),
        steps((k + kInt4Steps - 1) / kInt4Steps),
        groups((k + group - 1) / group),
        scale(columns / kInt4Columns * steps * kInt4UnitBytes),
        zero(scale + groups * columns * 4),
        bytes(zero + groups * columns) {}
};

struct Int4PackArgs {
  const uint8_t* weight;      // [N, ceil(K / 2)], even k in the low nibble
  const void* scale;          // [N, groups]
  cpu::DType scale_type;      // kFloat16 or kFloat32
  const uint8_t* zero_point;  // [N, groups] or null: 8
  int64_t n, k, group;
  uint8_t* packed;  // Int4Layout::bytes, aligned to 16
};

// y[m, n] = activation(Σ_groups scale · Σ_k x[m, k] (weight[n, k] - zero) + bias[n]) + residual[m, n]; the sums in
// float32.
struct Int4LinearArgs {
  const void*
      x;  // [M, ldx] of 16 bits; ldx a multiple of eight, the address of 16; zeros from K to the next multiple of 8
  cpu::DType type;  // of x, kFloat16 or kBFloat16
  const uint8_t* packed;
  const float* bias;            // [N] or null
  const void* residual;         // [M, N] of y's type, or null
  void* y;                      // [M, N]
  int64_t m, n, k, ldx, group;  // group: a multiple of 32, or K and more
  cpu::DType y_type;
  cpu::Activation activation;
};

void int4_pack(const Int4PackArgs& args, StreamHandle stream);
void int4_linear(const Int4LinearArgs& args, StreamHandle stream);

}  // namespace tcompress::cuda
