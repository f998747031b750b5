// Quantization of each row of x [M, K] to integers of at most 8 bits, by a range of its own or by one that is given;
// the numbers are defined in quantize_row.h.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "path_kind.h"

namespace tcompress::cpu {

// Known before the rows are.
struct FixedScale {
  float scale;
  int32_t zero_point;  // 0 if symmetric
};

// One row. flip is XORed into each byte (0x80 turns signed into offset-128 unsigned); k_padded - k zero bytes follow.
struct QuantizeRowArgs {
  const void* x;  // [k]
  DType dtype;
  int64_t k;
  int bits;
  bool symmetric;
  uint8_t flip;
  uint8_t* q;  // [k_padded]
  int64_t k_padded;
  float* scale;
  int32_t* zero_point;
  const FixedScale* fixed = nullptr;  // of all rows, or the row's own range decides
};

using QuantizeRow = void (*)(const QuantizeRowArgs&);

void quantize_row_scalar(const QuantizeRowArgs& args);
void quantize_row_avx2(const QuantizeRowArgs& args);
void quantize_row_avx512(const QuantizeRowArgs& args);
void quantize_row_neon(const QuantizeRowArgs& args);

QuantizeRow quantize_row_for(Path path);

struct QuantizePerTokenArgs {
  const void* x;  // [M, K], contiguous
  DType dtype;
  int64_t m, k;
  int bits;             // 2 … 8
  bool symmetric;       // q is int8, else uint8
  uint8_t* q;           // [M, K]
  float* scale;         // [M]
  int32_t* zero_point;  // [M]
  const FixedScale* fixed = nullptr;
};

void quantize_per_token(const QuantizePerTokenArgs& args, int num_threads);

}  // namespace tcompress::cpu
