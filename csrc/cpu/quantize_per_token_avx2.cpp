#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")

#include "quantize_row.h"
#include "vec_avx2.h"

namespace tcompress::cpu {

void quantize_row_avx2(const QuantizeRowArgs& args) { quantize_row<Vec>(args); }

}  // namespace tcompress::cpu

#endif  // __x86_64__
