// The int4 part of kernels_test.cpp.
#pragma once

#include "path.h"

void run_int4(tcompress::cpu::Path path, bool few);
