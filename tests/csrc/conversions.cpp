// The conversions of one path's vector class, without its instruction set's name: compiled once for each of vec_*.h.
// -DCONVERSIONS=name gives the exported struct its name, -DVEC_HEADER the header.

#if defined(TARGET_AVX512)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#elif defined(TARGET_AVX2)
#pragma GCC target("avx2,fma,f16c")
#endif

#include VEC_HEADER

#include "conversions.h"

namespace {

using tcompress::cpu::BFloat16;
using tcompress::cpu::Float16;
using tcompress::cpu::store;
using tcompress::cpu::Vec;

// n is a multiple of 16, so that no path has a tail.
template <class From, class To>
void convert(const void* from, void* to, int64_t n) {
  for (int64_t i = 0; i < n; i += Vec::kLanes)
    store(static_cast<To*>(to) + i, Vec::load(static_cast<const From*>(from) + i));
}

}  // namespace

extern const Conversions CONVERSIONS;
const Conversions CONVERSIONS = {Vec::kLanes, convert<Float16, float>, convert<BFloat16, float>,
                                 convert<float, Float16>, convert<float, BFloat16>};
