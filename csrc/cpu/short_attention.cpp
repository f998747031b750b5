// The split of the work over threads: whole heads of k and v or, where there are too few, blocks of their rows.
#include "short_attention.h"

#include "linear_grid.h"
#include "path.h"
#include "threads.h"

namespace tcompress::cpu {
namespace {

constexpr int64_t kScratchFloats = 2 * kKeyBlock * kMaxHeadDim;
constexpr int64_t kMinMacsPerShortThread = 1 << 16;  // in float32: about 3 us of work

}  // namespace

void short_attention(const ShortArgs& args, int num_threads) {
  const int64_t units = args.batch * args.kv_heads;
  if (units == 0 || args.heads == 0 || args.sq == 0) return;
  const AttentionPath& path = attention_path(current_path());
  const int64_t rows = args.heads / args.kv_heads * args.sq;
  const int64_t macs = units * rows * args.skv * (args.d + args.dv);
  const int threads = useful_threads(macs, kMinMacsPerShortThread, num_threads);
  const int64_t parts = units >= threads ? 1 : smaller(rows, ceil_div(threads, units)), tasks = units * parts;
  float* memory = reinterpret_cast<float*>(scratch(threads * kScratchFloats * 4));
  parallel_tasks(threads, [&](int thread) {
    for (int64_t task = tasks * thread / threads; task < tasks * (thread + 1) / threads; ++task) {
      const int64_t unit = task / parts, part = task % parts;
      path.short_rows({&args, unit / args.kv_heads, unit % args.kv_heads, rows * part / parts,
                       rows * (part + 1) / parts, memory + thread * kScratchFloats});
    }
  });
}

}  // namespace tcompress::cpu
