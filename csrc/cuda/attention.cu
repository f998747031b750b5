#include "attention.cuh"

namespace tcompress::cuda {

void attention(const AttentionArgs& args, StreamHandle stream) { run_attention(args, stream); }

void pad_values(const Heads& v, DType type, int64_t batch, int64_t heads, int64_t skv, int64_t dv, void* to,
                DType to_type, int64_t width, StreamHandle stream) {
  run_pad_values(v, type, batch, heads, skv, dv, to, to_type, width, stream);
}

}  // namespace tcompress::cuda
