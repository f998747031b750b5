// The 2:4 part of kernels_test.cpp.
#pragma once

#include "path.h"

void run_two_four(tcompress::cpu::Path path, bool few);
