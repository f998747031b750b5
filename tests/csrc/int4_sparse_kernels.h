// The part of kernels_test.cpp for 4-bit weights with zeros.
#pragma once

#include "path.h"

void run_int4_sparse(tcompress::cpu::Path path, bool few);
