#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")

#include "quantize_row.h"
#include "vec_avx512.h"

namespace tcompress::cpu {

void quantize_row_avx512(const QuantizeRowArgs& args) { quantize_row<Vec>(args); }

}  // namespace tcompress::cpu

#endif  // __x86_64__
