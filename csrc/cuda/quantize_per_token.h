// Dynamic quantization of tokens on CUDA: the contract of quantize_per_token.cuh. Free of torch.
#pragma once

#include <cstdint>

#include "../cpu/dtype.h"
#include "int8_linear.h"

namespace tcompress::cuda {

// The integers and scales of tcompress/ops/quantize_per_token.py, bit for bit.
struct QuantizeArgs {
  const void* x;  // [M, K], contiguous
  cpu::DType type;
  int64_t m, k;
  int bits;  // 2 to 8
  bool symmetric;
  bool centred;  // store q - zero_point, as int8: at most 7 bits where it is not symmetric
  void* q;       // [M, ldq] int8 or uint8; zeros beyond K
  int64_t ldq;
  float* scale;         // [M]
  int32_t* zero_point;  // [M] or null
};

void quantize_per_token(const QuantizeArgs& args, StreamHandle stream);

// Σ_k weight[n, k], for the zero points of activations.
void row_sums(const int8_t* weight, int64_t n, int64_t k, int64_t stride, int32_t* sums, StreamHandle stream);

// Rows of k bytes to a stride that is a multiple of 16, for K that is not.
void pad_rows(const int8_t* from, int64_t rows, int64_t k, int8_t* to, int64_t stride, StreamHandle stream);

}  // namespace tcompress::cuda
