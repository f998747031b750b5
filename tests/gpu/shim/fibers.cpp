#include "fibers.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace shim {

Fiber* current = nullptr;
uint3 block_index{}, grid_size{}, block_size{};
char* shared_memory = nullptr;
uint32_t shared_bytes = 0;
Order order = Order::kForward;
uint64_t seed = 1;
Bug planted = Bug::kNone;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 4096;
constexpr unsigned char kUninitialised = 0xCD;

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::function<void()> body;
std::string failure;
void* scheduler_stack_pointer = nullptr;

#if defined(__SANITIZE_ADDRESS__)
// The sanitizer wants to know on which stack it is.
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
void before_fiber(Fiber& f) { __sanitizer_start_switch_fiber(&scheduler_fake_stack, f.stack, kStackBytes); }
void back_in_scheduler() { __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr); }
void before_scheduler(void** fake) {
  __sanitizer_start_switch_fiber(current->done ? nullptr : fake, scheduler_stack, scheduler_stack_bytes);
}
void back_in_fiber(void* fake) { __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_stack_bytes); }
#else
void before_fiber(Fiber&) {}
void back_in_scheduler() {}
void before_scheduler(void**) {}
void back_in_fiber(void*) {}
#endif

void enter();

#if defined(__x86_64__)
// swapcontext asks the kernel for the signal mask each time: 20 times slower than saving the six registers.
extern "C" void shim_switch_stack(void** save, void* to);
asm(R"(
.text
.type shim_switch_stack,@function
shim_switch_stack:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size shim_switch_stack,.-shim_switch_stack
)");
void prepare_stack(Fiber& f) {
  auto* top = reinterpret_cast<uint64_t*>(f.stack + kStackBytes);
  *--top = 0;  // no return address: `enter` never returns
  *--top = reinterpret_cast<uint64_t>(&enter);
  for (int i = 0; i < 6; ++i) *--top = 0;
  f.stack_pointer = top;
}
void switch_to_fiber(Fiber& f) { shim_switch_stack(&scheduler_stack_pointer, f.stack_pointer); }
void switch_to_scheduler() { shim_switch_stack(&current->stack_pointer, scheduler_stack_pointer); }
#else
ucontext_t scheduler_context;
std::vector<ucontext_t> contexts;
void prepare_stack(Fiber& f) {
  contexts.resize(fibers.size());
  ucontext_t& c = contexts[f.index];
  getcontext(&c);
  c.uc_stack.ss_sp = f.stack;
  c.uc_stack.ss_size = kStackBytes;
  makecontext(&c, enter, 0);
}
void switch_to_fiber(Fiber& f) { swapcontext(&scheduler_context, &contexts[f.index]); }
void switch_to_scheduler() { swapcontext(&contexts[current->index], &scheduler_context); }
#endif

void yield() {
  void* fake = nullptr;
  before_scheduler(&fake);
  switch_to_scheduler();
  back_in_fiber(fake);
}

void enter() {
  back_in_fiber(nullptr);
  body();
  current->done = true;
  current_warp().exited |= 1u << lane();
  yield();
  std::abort();
}

void resume(Fiber& f) {
  current = &f;
  f.waiting = Waiting::kNo;
  before_fiber(f);
  switch_to_fiber(f);
  back_in_scheduler();
  current = nullptr;
  if (!failure.empty()) throw std::runtime_error(failure);
}

std::string where() {
  return " (block " + std::to_string(block_index.x) + "," + std::to_string(block_index.y) + ", thread " +
         std::to_string(current ? current->index : -1) + ")";
}

bool can_run(const Fiber& f) {
  if (f.done || f.waiting == Waiting::kBlockBarrier) return false;
  return f.waiting != Waiting::kWarp || warps[f.index / kWarpSize].generation != f.warp_generation;
}

bool step_warps(std::mt19937_64& random) {
  std::vector<size_t> ids(warps.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::shuffle(ids.begin(), ids.end(), random);
  bool progress = false;
  for (size_t w : ids) {
    for (bool again = true; again;) {
      again = false;
      for (size_t i = w * kWarpSize; i < std::min(fibers.size(), (w + 1) * kWarpSize); ++i)
        if (can_run(fibers[i])) resume(fibers[i]), again = progress = true;
    }
  }
  return progress;
}

void run_block(std::mt19937_64& random) {
  std::vector<size_t> ids(fibers.size());
  std::iota(ids.begin(), ids.end(), 0);
  if (order == Order::kReverse) std::reverse(ids.begin(), ids.end());
  for (Fiber& f : fibers) {
    f.done = false;
    f.waiting = Waiting::kNo;
    f.open_group.clear();
    f.groups.clear();
    prepare_stack(f);
  }
  for (Warp& w : warps) w.arrived = w.exited = 0;
  for (;;) {
    bool progress = false;
    if (order == Order::kWarpGreedy) {
      progress = step_warps(random);
    } else {
      if (order == Order::kRandom) std::shuffle(ids.begin(), ids.end(), random);
      for (size_t i : ids)
        if (can_run(fibers[i])) resume(fibers[i]), progress = true;
    }
    size_t done = 0, at_barrier = 0;
    for (const Fiber& f : fibers) done += f.done, at_barrier += !f.done && f.waiting == Waiting::kBlockBarrier;
    if (done == fibers.size()) return;
    if (at_barrier + done == fibers.size()) {
      if (done > 0) throw std::runtime_error("a barrier after some threads have exited" + where());
      for (Fiber& f : fibers) f.waiting = Waiting::kNo;
    } else if (!progress) {
      throw std::runtime_error("deadlock: a barrier or a warp instruction that some threads do not reach" + where());
    }
  }
}

}  // namespace

Warp& current_warp() { return warps[current->index / kWarpSize]; }

void fail(const std::string& message) {
  failure = message + where();
  yield();
  std::abort();
}

void block_barrier() {
  current->waiting = Waiting::kBlockBarrier;
  yield();
}

void meet(const char* instruction, uint32_t mask, const std::function<void(Warp&)>& execute) {
  Warp& w = current_warp();
  const uint32_t bit = 1u << lane();
  if (!(mask & bit)) fail(std::string(instruction) + ": a lane that its own mask leaves out");
  if (w.arrived == 0) {
    w.mask = mask;
    w.instruction = instruction;
  }
  if (w.mask != mask || std::strcmp(w.instruction, instruction) != 0)
    fail(std::string("lanes of a warp disagree: ") + w.instruction + " and " + instruction);
  if (mask & w.exited) fail(std::string(instruction) + ": the mask names a lane that has exited");
  w.arrived |= bit;
  if (w.arrived == mask) {
    execute(w);
    w.arrived = 0;
    ++w.generation;
    return;
  }
  current->waiting = Waiting::kWarp;
  current->warp_generation = w.generation;
  yield();
}

void run(const std::function<void()>& kernel, uint3 grid, int threads, uint32_t shared) {
  static std::vector<char*> stacks;
  while (static_cast<int>(stacks.size()) < threads) {
    void* p = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(p, kGuardBytes, PROT_NONE) != 0) throw std::runtime_error("no memory for stacks");
    stacks.push_back(static_cast<char*>(p) + kGuardBytes);
  }
  failure.clear();
  body = kernel;
  fibers.assign(threads, Fiber());
  warps.assign((threads + kWarpSize - 1) / kWarpSize, Warp());
  for (int i = 0; i < threads; ++i) {
    fibers[i].stack = stacks[i];
    fibers[i].index = i;
    fibers[i].thread = {static_cast<unsigned>(i), 0, 0};
  }
  grid_size = grid;
  block_size = {static_cast<unsigned>(threads), 1, 1};
  shared_bytes = shared;
  std::mt19937_64 random(seed);
  std::vector<char> window(shared + 1024);
  shared_memory = window.data() + (1024 - reinterpret_cast<uintptr_t>(window.data()) % 1024) % 1024;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = {x, y, z};
        std::memset(shared_memory, kUninitialised, shared);
        run_block(random);
      }
}

}  // namespace shim
