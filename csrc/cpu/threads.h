// Runs tasks on OpenMP threads. torch's wheels load libgomp first, so this is torch's own pool: no second set of
// threads competes for the cores. The caller passes torch's thread count.
#pragma once

#include <omp.h>

#include <cstdint>

#include "integers.h"

namespace tcompress::cpu {

// Calls task(i) for every i in [0, n). task must not throw.
template <class Task>
void parallel_tasks(int n, const Task& task) {
  if (n <= 1 || omp_in_parallel()) {
    for (int i = 0; i < n; ++i) task(i);
    return;
  }
#pragma omp parallel num_threads(n)
  {
    // The runtime may grant fewer threads than asked for; every task still runs.
    for (int i = omp_get_thread_num(); i < n; i += omp_get_num_threads()) task(i);
  }
}

// As many threads as have work: at least one, at most max_threads.
inline int useful_threads(int64_t work, int64_t min_work_per_thread, int max_threads) {
  const int64_t wanted = ceil_div(work, min_work_per_thread);
  return static_cast<int>(wanted < 1 ? 1 : (wanted < max_threads ? wanted : max_threads));
}

}  // namespace tcompress::cpu
