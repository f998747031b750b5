// The kernels of csrc/cuda, emulated, behind a C interface for tests/gpu/shim_library.py.

#include "int8_linear.cuh"
#include "quantize_per_token.cuh"

using namespace tcompress::cuda;

namespace {

std::string error;

template <class Fn>
int guarded(Fn fn) {
  try {
    fn();
    return 0;
  } catch (const std::exception& e) {
    error = e.what();
    return 1;
  }
}

}  // namespace

extern "C" {

const char* shim_error() { return error.c_str(); }

void shim_configure(int order, uint64_t seed, int planted) {
  shim::order = static_cast<shim::Order>(order);
  shim::seed = seed;
  shim::planted = static_cast<shim::Bug>(planted);
}

int shim_quantize_per_token(const void* x, int type, int64_t m, int64_t k, int bits, int symmetric, int centred,
                            void* q, int64_t ldq, float* scale, int32_t* zero_point) {
  return guarded([&] {
    run_quantize_per_token(
        {x, static_cast<DType>(type), m, k, bits, symmetric != 0, centred != 0, q, ldq, scale, zero_point}, nullptr);
  });
}

int shim_row_sums(const int8_t* weight, int64_t n, int64_t k, int64_t stride, int32_t* sums) {
  return guarded([&] { run_row_sums(weight, n, k, stride, sums, nullptr); });
}

int shim_pad_rows(const int8_t* from, int64_t rows, int64_t k, int8_t* to, int64_t stride) {
  return guarded([&] { run_pad_rows(from, rows, k, to, stride, nullptr); });
}

int shim_int8_linear(const int8_t* a, const int8_t* weight, const float* scale, const float* weight_scale,
                     const int32_t* zero_point, const int32_t* weight_sum, const float* bias, const void* residual,
                     void* y, int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldw, int y_type, int activation,
                     int multiprocessors, int tile) {
  return guarded([&] {
    run_int8_linear({a, weight, scale, weight_scale, zero_point, weight_sum, bias, residual, y, m, n, k, lda, ldw,
                     static_cast<DType>(y_type), static_cast<Activation>(activation), multiprocessors},
                    nullptr, static_cast<Int8Tile>(tile));
  });
}

}  // extern "C"
