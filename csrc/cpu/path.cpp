#include "path.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace tcompress::cpu {
namespace {

constexpr int kAutomatic = -1;

#if defined(__x86_64__)
constexpr bool built(Path path) { return path != Path::kNeon; }

// Linux keeps the tile registers for processes that ask for them, once for all threads.
bool has_amx_int8() {
#if defined(__linux__)
  static const bool granted = [] {
    constexpr unsigned kTileBit = 1u << 24, kInt8Bit = 1u << 25;  // leaf 7, edx
    constexpr long kRequestPermission = 0x1023, kTileData = 18;   // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
    if ((edx & kTileBit) == 0 || (edx & kInt8Bit) == 0) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return granted;
#else
  return false;
#endif
}

std::string missing_feature(Path path) {
  // __builtin_cpu_supports also asks the operating system whether it saves the wider registers.
  if (path >= Path::kAvx2) {
    if (!__builtin_cpu_supports("avx2")) return "avx2";
    if (!__builtin_cpu_supports("fma")) return "fma";
    if (!__builtin_cpu_supports("f16c")) return "f16c";
  }
  // Later paths do not build on this one: there are processors with AVX-512 VNNI and without AVX-VNNI.
  if (path == Path::kAvxVnni && !__builtin_cpu_supports("avxvnni")) return "avxvnni";
  if (path >= Path::kAvx512Vnni) {
    if (!__builtin_cpu_supports("avx512f")) return "avx512f";
    if (!__builtin_cpu_supports("avx512bw")) return "avx512bw";
    if (!__builtin_cpu_supports("avx512vl")) return "avx512vl";
    if (!__builtin_cpu_supports("avx512dq")) return "avx512dq";
    if (!__builtin_cpu_supports("avx512vnni")) return "avx512vnni";
  }
  if (path >= Path::kAmx && !has_amx_int8()) return "amx_int8, or Linux does not grant its tiles";
  return "";
}
#elif defined(__aarch64__)
constexpr bool built(Path path) { return path == Path::kNeon; }

std::string missing_feature(Path) {
#if defined(__linux__)
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP, which old headers do not name
  return (getauxval(AT_HWCAP) & kDotProduct) != 0 ? "" : "asimddp";
#elif defined(__APPLE__)
  return "";  // since Apple's first processor for the Mac
#else
  return "asimddp in a way that is known here";
#endif
}
#else
constexpr bool built(Path) { return false; }

std::string missing_feature(Path) { return ""; }
#endif

Path parse(const std::string& name) {
  std::string known;
  for (Path path : kAllPaths) {
    if (name == path_name(path)) return path;
    known += std::string(known.empty() ? "" : ", ") + path_name(path);
  }
  throw std::invalid_argument("cpu path: name: got '" + name + "', expected one of " + known +
                              "; see TCOMPRESS_CPU_PATH");
}

int checked(const std::string& name) {
  if (name.empty()) return kAutomatic;
  const Path path = parse(name);
  const std::string reason = why_not_usable(path);
  if (!reason.empty())
    throw std::runtime_error("cpu path: name: got '" + name + "', expected a usable path; " + reason);
  return static_cast<int>(path);
}

std::atomic<int>& forced() {
  // If the environment names a path that cannot run, this throws at every use, not only at the first.
  static std::atomic<int> value{[] {
    const char* name = std::getenv("TCOMPRESS_CPU_PATH");
    return checked(name == nullptr ? "" : name);
  }()};
  return value;
}

}  // namespace

const char* path_name(Path path) {
  switch (path) {
    case Path::kScalar:
      return "scalar";
    case Path::kAvx2:
      return "avx2";
    case Path::kAvxVnni:
      return "avxvnni";
    case Path::kAvx512Vnni:
      return "avx512vnni";
    case Path::kAmx:
      return "amx";
    case Path::kNeon:
      return "neon";
  }
  return "unknown";
}

std::string why_not_usable(Path path) {
  if (path == Path::kScalar) return "";
  if (!built(path))
    return std::string("not built: the compiler does not target ") + (path == Path::kNeon ? "AArch64" : "x86-64");
  const std::string feature = missing_feature(path);
  return feature.empty() ? "" : "this processor does not report " + feature;
}

std::vector<Path> usable_paths() {
  std::vector<Path> paths;
  for (Path path : kAllPaths)
    if (why_not_usable(path).empty()) paths.push_back(path);
  return paths;
}

Path current_path() {
  const int value = forced().load(std::memory_order_relaxed);
  if (value != kAutomatic) return static_cast<Path>(value);
  static const Path best = usable_paths().back();  // kAllPaths is in ascending order
  return best;
}

void force_path(const std::string& name) { forced().store(checked(name), std::memory_order_relaxed); }

std::string forced_path() {
  const int value = forced().load(std::memory_order_relaxed);
  return value == kAutomatic ? "" : path_name(static_cast<Path>(value));
}

}  // namespace tcompress::cpu
