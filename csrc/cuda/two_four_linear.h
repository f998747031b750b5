// int8 linear layer with a 2:4 weight on CUDA: the contract of two_four_linear.cuh. Free of torch.
#pragma once

#include <cstdint>

#include "int8_linear.h"

namespace tcompress::cuda {

// A unit of the kernel's weight: 16 output features and 64 of k, of which 32 are kept.
//   [N / 16][K / 64] units of  [lane 32][16 bytes]: the fragment of mma.sp, then  [lane 32] words of positions
constexpr int kSparseFeatures = 16, kSparseSteps = 64, kSparseValueBytes = 512, kSparseUnitBytes = 640;

struct TwoFourLayout {
  int64_t rows, steps, bytes;  // in units

  constexpr TwoFourLayout(int64_t n, int64_t k)
      : rows((n + kSparseFeatures - 1) / kSparseFeatures),
        steps((k + kSparseSteps - 1) / kSparseSteps),
        bytes(rows * steps * kSparseUnitBytes) {}
};

// From the storage layout "N:M" (tcompress/packing/sparse_n_m.py): values [N, ceil(K / 4), 2], and four bits a group.
struct TwoFourPackArgs {
  const int8_t* values;
  const uint8_t* index;
  int64_t n, k;
  uint8_t* packed;  // TwoFourLayout::bytes, aligned to 16
};

void two_four_pack(const TwoFourPackArgs& args, StreamHandle stream);

// `int8_linear` with args.weight the packed weight; args.ldw is not used.
void two_four_linear(const Int8LinearArgs& args, StreamHandle stream);

}  // namespace tcompress::cuda
