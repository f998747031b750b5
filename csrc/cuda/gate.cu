#include "gate.cuh"

namespace tcompress::cuda {

void gate(const GateArgs& args, StreamHandle stream) { run_gate(args, stream); }

}  // namespace tcompress::cuda
