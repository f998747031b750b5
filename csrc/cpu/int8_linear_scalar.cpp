// Portable path: plain loops that a compiler vectorizes with whatever the baseline has.

#include "epilogue.h"
#include "int8_linear.h"
#include "vec_scalar.h"

namespace tcompress::cpu {
namespace {

constexpr int kRows = 4;

// Both schemes fit int8: symmetric -127 … 127, asymmetric 0 … 127.
void tile(const Int8TileArgs& args) {
  for (int p = 0; p < args.n_panels; ++p) {
    for (int r = 0; r < args.rows; ++r) {
      const int8_t* a = reinterpret_cast<const int8_t*>(args.a + r * args.a_stride);
      int32_t sum[kPanel] = {};
      for (int64_t step = 0; step < args.steps; ++step) {
        const int8_t* w = args.weights + (step * args.n_panels + p) * kPanel * kQuad;
        for (int n = 0; n < kPanel; ++n)
          for (int i = 0; i < kQuad; ++i) sum[n] += static_cast<int32_t>(a[step * kQuad + i]) * w[n * kQuad + i];
      }
      int32_t* out = args.acc + (static_cast<int64_t>(r) * args.n_panels + p) * kPanel;
      for (int n = 0; n < kPanel; ++n) out[n] = sum[n];
    }
  }
}

}  // namespace

const Int8LinearPath kInt8LinearScalar = {kRows, 1, 4, 0, 0, quantize_row_scalar, tile, tile, epilogue_for<Vec>};

}  // namespace tcompress::cpu
