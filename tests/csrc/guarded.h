// Buffers between two pages that may not be touched, and the count of what was checked.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

inline int failures = 0;
inline int checks = 0;

inline void check(bool ok, const std::string& what) {
  ++checks;
  if (!ok && ++failures <= 20) std::printf("FAILED %s\n", what.c_str());
}

// n elements that end (or begin) exactly at a page without access.
template <class T>
class Guarded {
 public:
  Guarded(int64_t n, bool at_end) : n_(n) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
    const int64_t inner = (bytes + page - 1) / page * page + page;  // at least one page, also for nothing
    size_ = inner + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + page, inner, PROT_READ | PROT_WRITE) != 0) std::abort();
    std::memset(base_ + page, 0x5a, inner);
    data_ = reinterpret_cast<T*>(at_end ? base_ + page + inner - bytes : base_ + page);
  }
  ~Guarded() { munmap(base_, size_); }
  Guarded(const Guarded&) = delete;
  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  int64_t size() const { return n_; }

 private:
  int64_t n_, size_;
  char* base_;
  T* data_;
};
