// csrc/cpu/path.cpp on a processor of the test's choosing: compiled with __builtin_cpu_supports(f) defined as lacks(f),
// so that the features named in LACKS are missing. Prints what it reports, and what a forced path does, twice.

#include <cstdio>
#include <exception>

#include "path.h"

namespace cpu = tcompress::cpu;

int main() {
  for (cpu::Path path : cpu::kAllPaths)
    std::printf("%s: %s\n", cpu::path_name(path), cpu::why_not_usable(path).c_str());
  for (int i = 0; i < 2; ++i) {
    try {
      std::printf("current: %s\n", cpu::path_name(cpu::current_path()));
    } catch (const std::exception& error) {
      std::printf("error: %s\n", error.what());
    }
  }
}
