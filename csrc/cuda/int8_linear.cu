#include "int8_linear.cuh"

namespace tcompress::cuda {

void int8_linear(const Int8LinearArgs& args, StreamHandle stream, Int8Tile tile) {
  run_int8_linear(args, stream, tile);
}

}  // namespace tcompress::cuda
