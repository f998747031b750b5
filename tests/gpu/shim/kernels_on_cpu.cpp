// The kernels of csrc/cuda, emulated, behind a C interface for tests/gpu/shim_library.py.

#include "attention.cuh"
#include "gate.cuh"
#include "int4_linear.cuh"
#include "int8_linear.cuh"
#include "quantize_per_token.cuh"
#include "two_four_linear.cuh"

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

// shape: B, H, Hkv, Sq, Skv, D, Dv. strides: of q, k, v, three each, then the mask's four. Integers and scales stay in
// the workspace.
int64_t shim_attention_workspace(const int64_t* shape, int64_t* offsets) {
  AttentionArgs args{};
  args.batch = shape[0], args.heads = shape[1], args.kv_heads = shape[2], args.sq = shape[3], args.skv = shape[4];
  args.d = shape[5], args.dv = shape[6];
  const AttentionLayout l(args);
  const int64_t all[] = {l.sqp, l.skp, l.q, l.k, l.q_scale, l.shift, l.k_scale, l.mean, padded_head(args.d, args.dv)};
  for (size_t i = 0; i < sizeof all / sizeof *all; ++i) offsets[i] = all[i];
  return l.bytes;
}

int shim_attention(const void* q, const void* k, const void* v, const void* mask, int mask_kind, int mask_type,
                   int type, int v_type, const int64_t* shape, const int64_t* strides, int64_t offset, int64_t left,
                   int64_t right, float scale, float softcap, void* out, float* lse, void* workspace) {
  return guarded([&] {
    const auto heads = [&](const void* data, int i) {
      return Heads{data, strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]};
    };
    AttentionArgs args{
        heads(q, 0),
        heads(k, 1),
        heads(v, 2),
        static_cast<DType>(type),
        static_cast<DType>(v_type),
        shape[0],
        shape[1],
        shape[2],
        shape[3],
        shape[4],
        shape[5],
        shape[6],
        {mask, mask_kind == 1, static_cast<DType>(mask_type), strides[9], strides[10], strides[11], strides[12]},
        offset,
        left,
        right,
        scale,
        softcap,
        out,
        lse,
        workspace};
    run_attention(args, nullptr);
  });
}

int shim_pad_values(const void* v, int type, const int64_t* shape, const int64_t* strides, void* to, int to_type,
                    int64_t width) {
  return guarded([&] {
    run_pad_values({v, strides[6], strides[7], strides[8]}, static_cast<DType>(type), shape[0], shape[2], shape[4],
                   shape[6], to, static_cast<DType>(to_type), width, nullptr);
  });
}

int64_t shim_int4_bytes(int64_t n, int64_t k, int64_t group) { return Int4Layout(n, k, group).bytes; }

int shim_int4_pack(const uint8_t* weight, const void* scale, int scale_type, const uint8_t* zero_point, int64_t n,
                   int64_t k, int64_t group, uint8_t* packed) {
  return guarded([&] {
    run_int4_pack({weight, scale, static_cast<DType>(scale_type), zero_point, n, k, group, packed}, nullptr);
  });
}

int shim_int4_linear(const void* x, int type, const uint8_t* packed, const float* bias, const void* residual, void* y,
                     int64_t m, int64_t n, int64_t k, int64_t ldx, int64_t group, int y_type, int activation) {
  return guarded([&] {
    run_int4_linear({x, static_cast<DType>(type), packed, bias, residual, y, m, n, k, ldx, group,
                     static_cast<DType>(y_type), static_cast<Activation>(activation)},
                    nullptr);
  });
}

int shim_gate(void* y, int type, const float* gate, int64_t count) {
  return guarded([&] { run_gate({y, static_cast<DType>(type), gate, count}, nullptr); });
}

int64_t shim_two_four_bytes(int64_t n, int64_t k) { return TwoFourLayout(n, k).bytes; }

int shim_two_four_pack(const int8_t* values, const uint8_t* index, int64_t n, int64_t k, uint8_t* packed) {
  return guarded([&] { run_two_four_pack({values, index, n, k, packed}, nullptr); });
}

int shim_two_four_linear(const int8_t* a, const uint8_t* packed, const float* scale, const float* weight_scale,
                         const float* bias, void* y, int64_t m, int64_t n, int64_t k, int64_t lda, int y_type,
                         int activation, int multiprocessors) {
  return guarded([&] {
    run_two_four_linear(
        {a, reinterpret_cast<const int8_t*>(packed), scale, weight_scale, nullptr, nullptr, bias, nullptr, y, m, n, k,
         lda, 0, static_cast<DType>(y_type), static_cast<Activation>(activation), multiprocessors},
        nullptr);
  });
}

}  // extern "C"
