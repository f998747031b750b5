// The part of kernels_test.cpp for weights with zeros.
#pragma once

#include "path.h"

void run_sparse(tcompress::cpu::Path path, bool few);
