// Attention, its cache included, between guard pages; see kernels_test.cpp.
#pragma once

#include "path.h"

void run_attention(tcompress::cpu::Path path, bool few);
