// int8 linear layer on CUDA: the contract of int8_linear.cuh. Free of torch.
#pragma once

#include <cstdint>

#include "../cpu/activation_kind.h"
#include "../cpu/dtype.h"

struct CUstream_st;  // what cudaStream_t points to

namespace tcompress::cuda {

// y[m, n] = activation(float(acc) · scale[m] · weight_scale[n] + bias[n]) + residual[m, n], in this order, each step
// rounded to float32, the result once to y's type; acc = Σ_k (a[m, k] - zero_point[m]) · weight[n, k] in int32.
// y of int32 is acc itself.
struct Int8LinearArgs {
  const int8_t* a;            // [M, lda]; lda and the address multiples of 16; zeros from K to the next multiple of 16
  const int8_t* weight;       // [N, ldw], alike, but for the zeros
  const float* scale;         // [M]
  const float* weight_scale;  // [N]
  const int32_t* zero_point;  // [M] or null
  const int32_t* weight_sum;  // [N], Σ_k weight[n, k]; given where zero_point is
  const float* bias;          // [N] or null
  const void* residual;       // [M, N] of y's type, or null
  void* y;                    // [M, N]
  int64_t m, n, k, lda, ldw;
  cpu::DType y_type;
  cpu::Activation activation;
  int multiprocessors;  // of the device; decides the tile
};

// int32 holds Σ_k of this many products of |a - zero_point| <= 255 and |w| <= 128.
constexpr int64_t kMaxK = 65536;

enum class Int8Tile { kAuto, kWide, kMiddle, kNarrow };

#if defined(TCOMPRESS_CUDA_ON_CPU)
using StreamHandle = void*;
#else
using StreamHandle = ::CUstream_st*;
#endif

void int8_linear(const Int8LinearArgs& args, StreamHandle stream, Int8Tile tile = Int8Tile::kAuto);

}  // namespace tcompress::cuda
