// The instruction sets that kernels are written for; which of them can run here is path.h's question. Apart from
// path.h, because files compiled for one instruction set must not include <string>: its inline code could be linked for
// everyone.
#pragma once

namespace tcompress::cpu {

// In ascending order of preference; no processor has both x86's paths and ARM's.
enum class Path : int { kScalar = 0, kAvx2 = 1, kAvxVnni = 2, kAvx512Vnni = 3, kAmx = 4, kNeon = 5 };

}  // namespace tcompress::cpu
