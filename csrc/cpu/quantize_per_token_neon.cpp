#if defined(__aarch64__)
#pragma GCC target("arch=armv8.2-a+dotprod")

#include "quantize_row.h"
#include "vec_neon.h"

namespace tcompress::cpu {

void quantize_row_neon(const QuantizeRowArgs& args) { quantize_row<Vec>(args); }

}  // namespace tcompress::cpu

#endif  // __aarch64__
