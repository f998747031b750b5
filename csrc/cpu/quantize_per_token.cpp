#include "quantize_per_token.h"

#include "path.h"
#include "threads.h"

namespace tcompress::cpu {
namespace {

constexpr int64_t kMinElementsPerThread = 1 << 15;  // about 5 us of work; starting a thread costs 1 to 2 us

}  // namespace

QuantizeRow quantize_row_for(Path path) {
  switch (path) {
#if defined(__x86_64__)
    case Path::kAvx2:
    case Path::kAvxVnni:
      return quantize_row_avx2;
    case Path::kAvx512Vnni:
    case Path::kAmx:
      return quantize_row_avx512;
#elif defined(__aarch64__)
    case Path::kNeon:
      return quantize_row_neon;
#endif
    default:
      return quantize_row_scalar;
  }
}

void quantize_per_token(const QuantizePerTokenArgs& args, int num_threads) {
  const QuantizeRow quantize_row = quantize_row_for(current_path());
  const int64_t row_bytes = args.k * (args.dtype == DType::kFloat32 ? 4 : 2);
  const int threads = useful_threads(args.m * args.k, kMinElementsPerThread, num_threads);
  parallel_tasks(threads, [&](int t) {
    const int64_t begin = args.m * t / threads, end = args.m * (t + 1) / threads;
    QuantizeRowArgs row{nullptr,    args.dtype, args.k, args.bits, args.symmetric,
                        /*flip=*/0, nullptr,    args.k, nullptr,   nullptr,        args.fixed};
    for (int64_t i = begin; i < end; ++i) {
      row.x = static_cast<const char*>(args.x) + i * row_bytes;
      row.q = args.q + i * args.k;
      row.scale = args.scale + i;
      row.zero_point = args.zero_point + i;
      quantize_row(row);
    }
  });
}

}  // namespace tcompress::cpu
