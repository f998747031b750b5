#include "two_four_linear.cuh"

namespace tcompress::cuda {

void two_four_pack(const TwoFourPackArgs& args, StreamHandle stream) { run_two_four_pack(args, stream); }
void two_four_linear(const Int8LinearArgs& args, StreamHandle stream) { run_two_four_linear(args, stream); }

}  // namespace tcompress::cuda
