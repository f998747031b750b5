// Portable path: plain loops that a compiler vectorizes with whatever the baseline has.

#include "epilogue.h"
#include "int4_linear.h"
#include "to_float.h"
#include "vec_scalar.h"

namespace tcompress::cpu {
namespace {

constexpr int kRows = 4;
constexpr int64_t kMaxSpanSteps = 128;

void corrections(const int8_t* a, int64_t steps, int64_t span_steps, bool has_zero_points, int32_t* out) {
  for (int64_t step = 0; step < steps; step += span_steps, ++out) {
    const int64_t end = step + span_steps < steps ? step + span_steps : steps;
    int32_t sum = 0;
    for (int64_t i = step * kQuad; i < end * kQuad; ++i) sum += a[i];
    *out = sum * (has_zero_points ? -1 : -kSymmetricZero);
  }
}

void unpack(const Int4ChunkArgs& args) {
  const int64_t pair_bytes = args.n_panels * kPanel * kQuad;
  uint8_t* out = static_cast<uint8_t*>(args.out);
  for (int64_t i = 0; i < args.steps / 2; ++i)
    for (int64_t j = 0; j < pair_bytes; ++j) {
      const uint8_t w = args.weights[i * pair_bytes + j];
      out[2 * i * pair_bytes + j] = w & 15;
      out[(2 * i + 1) * pair_bytes + j] = w >> 4;
    }
}

template <class Scale>
void tile(const Int4TileArgs& args) {
  const int width = args.n_panels * kPanel;
  const uint8_t* weights = static_cast<const uint8_t*>(args.weights);
  for (int r = 0; r < args.rows; ++r) {
    const int8_t* a = static_cast<const int8_t*>(args.a) + r * args.a_stride;
    for (int64_t span = 0; span * args.span_steps < args.steps; ++span) {
      const int64_t begin = span * args.span_steps;
      const int64_t end = begin + args.span_steps < args.steps ? begin + args.span_steps : args.steps;
      const int64_t group = span / args.spans_per_group * width;
      const int32_t correction = args.corrections[r * args.correction_stride + span];
      int32_t sum[kGroup];
      for (int n = 0; n < width; ++n)
        sum[n] = args.zero_points == nullptr ? correction : correction * args.zero_points[group + n];
      for (int64_t step = begin; step < end; ++step)
        for (int n = 0; n < width; ++n)
          for (int i = 0; i < kQuad; ++i)
            sum[n] += static_cast<int32_t>(a[step * kQuad + i]) * weights[(step * width + n) * kQuad + i];
      const Scale* scales = static_cast<const Scale*>(args.scales) + group;
      for (int n = 0; n < width; ++n) args.acc[r * width + n] += static_cast<float>(sum[n]) * to_float(scales[n]);
    }
  }
}

void float_unpack(const Int4ChunkArgs& args) {
  const int width = args.n_panels * kPanel;
  float* out = static_cast<float*>(args.out);
  for (int64_t step = 0; step < args.steps; ++step) {
    const uint8_t* zeros = args.zero_points == nullptr ? nullptr : args.zero_points + step / args.group_steps * width;
    for (int n = 0; n < width; ++n)
      for (int i = 0; i < kQuad; ++i) {
        const uint8_t both = args.weights[(step / 2 * width + n) * kQuad + i];
        const int w = step % 2 == 0 ? both & 15 : both >> 4;
        out[(step * kQuad + i) * width + n] = static_cast<float>(w - (zeros == nullptr ? kSymmetricZero : zeros[n]));
      }
  }
}

template <class Scale>
void float_tile(const Int4TileArgs& args) {
  const int width = args.n_panels * kPanel;
  const float* weights = static_cast<const float*>(args.weights);
  for (int r = 0; r < args.rows; ++r) {
    const float* a = static_cast<const float*>(args.a) + r * args.a_stride / static_cast<int64_t>(sizeof(float));
    for (int64_t span = 0; span * args.span_steps < args.steps; ++span) {
      const int64_t begin = span * args.span_steps * kQuad, whole = args.steps * kQuad;
      const int64_t end = begin + args.span_steps * kQuad < whole ? begin + args.span_steps * kQuad : whole;
      float sum[kGroup] = {};
      for (int64_t k = begin; k < end; ++k)
        for (int n = 0; n < width; ++n) sum[n] += a[k] * weights[k * width + n];
      const Scale* scales = static_cast<const Scale*>(args.scales) + span / args.spans_per_group * width;
      for (int n = 0; n < width; ++n) args.acc[r * width + n] += sum[n] * to_float(scales[n]);
    }
  }
}

}  // namespace

// No packed tiles: even one row unpacks.
const Int4LinearPath kInt4LinearScalar = {kRows,
                                          0,
                                          1,
                                          3,
                                          3,
                                          kMaxSpanSteps,
                                          quantize_row_scalar,
                                          corrections,
                                          {nullptr, nullptr},
                                          {tile<float>, tile<Float16>},
                                          {nullptr, nullptr},
                                          {float_tile<float>, float_tile<Float16>},
                                          unpack,
                                          float_unpack,
                                          row_to_float<Vec>,
                                          float_epilogue_for<Vec>};

}  // namespace tcompress::cpu
