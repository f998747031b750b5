#include "quantize_per_token.cuh"

namespace tcompress::cuda {

void quantize_per_token(const QuantizeArgs& args, StreamHandle stream) { run_quantize_per_token(args, stream); }

void row_sums(const int8_t* weight, int64_t n, int64_t k, int64_t stride, int32_t* sums, StreamHandle stream) {
  run_row_sums(weight, n, k, stride, sums, stream);
}

void pad_rows(const int8_t* from, int64_t rows, int64_t k, int8_t* to, int64_t stride, StreamHandle stream) {
  run_pad_rows(from, rows, k, to, stride, stream);
}

}  // namespace tcompress::cuda
