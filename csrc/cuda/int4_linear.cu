#include "int4_linear.cuh"

namespace tcompress::cuda {

void int4_pack(const Int4PackArgs& args, StreamHandle stream) { run_int4_pack(args, stream); }
void int4_linear(const Int4LinearArgs& args, StreamHandle stream) { run_int4_linear(args, stream); }

}  // namespace tcompress::cuda
