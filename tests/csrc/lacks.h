// Included before csrc/cpu/path.cpp by test_path_detection.py: the processor lacks what the variable LACKS names, and
// has everything else. (AMX is asked of the processor and of Linux directly.)
#pragma once

#include <cstdlib>
#include <string>

inline bool has_feature(const char* name) {
  const char* lacks = std::getenv("LACKS");
  return lacks == nullptr || (" " + std::string(lacks) + " ").find(" " + std::string(name) + " ") == std::string::npos;
}

#define __builtin_cpu_supports(name) has_feature(name)
