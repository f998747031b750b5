// Which instruction set the CPU kernels run on.
//
// A path is usable when it was built AND the processor reports it; the highest usable path wins. TCOMPRESS_CPU_PATH,
// read at first use, or force_path() overrides the choice; forcing a path that cannot run throws.
#pragma once

#include <string>
#include <vector>

#include "path_kind.h"

namespace tcompress::cpu {

constexpr Path kAllPaths[] = {Path::kScalar, Path::kAvx2, Path::kAvxVnni, Path::kAvx512Vnni, Path::kAmx, Path::kNeon};

const char* path_name(Path path);

// Empty when the path can run here, else the reason why not.
std::string why_not_usable(Path path);

std::vector<Path> usable_paths();

// The path in force: the forced one, else the highest usable.
Path current_path();

// An empty name returns to the automatic choice. Throws std::invalid_argument for an unknown name and
// std::runtime_error for a path that cannot run here.
void force_path(const std::string& name);

// The forced path's name, or an empty string.
std::string forced_path();

}  // namespace tcompress::cpu
