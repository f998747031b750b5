#include "quantize_row.h"
#include "vec_scalar.h"

namespace tcompress::cpu {

void quantize_row_scalar(const QuantizeRowArgs& args) { quantize_row<Vec>(args); }

}  // namespace tcompress::cpu
