// CUDA threads as fibers: a block's threads take turns on one processor thread, blocks run one after another.
//
// A fiber gives up its turn at a block barrier or a warp instruction alone, so between two of these a thread runs
// undisturbed; which thread goes next is the order's choice. A kernel that is right gives the same result in every
// order. A missing barrier shows in some: `kRandom` and `kWarpGreedy` (one warp runs as far as it can) find what the
// others miss.
#pragma once

#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

namespace shim {

struct uint3 {
  unsigned x, y, z;
};

enum class Order { kForward, kReverse, kRandom, kWarpGreedy };

// What a test plants into a kernel (TC_PLANTED) and must see caught.
enum class Bug { kNone, kMissingBarrier, kUnwaitedCopy, kOffByOne, kWrongMask };

struct Copy {
  uint32_t destination;
  const void* source;  // null: zeros
};

enum class Waiting { kNo, kBlockBarrier, kWarp };

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  uint3 thread{};
  int index = 0;
  bool done = false;
  Waiting waiting = Waiting::kNo;
  uint64_t warp_generation = 0;
  std::vector<Copy> open_group;           // cp.async not yet committed
  std::vector<std::vector<Copy>> groups;  // committed, not yet waited for
};

constexpr int kWarpSize = 32;
constexpr int kSlotBytes = 64;

struct Warp {
  uint32_t arrived = 0, exited = 0, mask = 0;
  uint64_t generation = 0;
  const char* instruction = nullptr;
  alignas(16) char in[kWarpSize][kSlotBytes];
  alignas(16) char out[kWarpSize][kSlotBytes];
};

// Of the launch in progress.
extern Fiber* current;
extern uint3 block_index, grid_size, block_size;
extern char* shared_memory;
extern uint32_t shared_bytes;

// Of the tests.
extern Order order;
extern uint64_t seed;
extern Bug planted;

Warp& current_warp();
inline int lane() { return current->index % kWarpSize; }

// Ends the launch: `run` throws std::runtime_error with this message.
[[noreturn]] void fail(const std::string& message);

void block_barrier();

// All lanes of `mask` meet here; the last one runs `execute` for all of them.
void meet(const char* instruction, uint32_t mask, const std::function<void(Warp&)>& execute);

void run(const std::function<void()>& kernel, uint3 grid, int threads, uint32_t shared);

}  // namespace shim
