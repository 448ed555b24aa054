#include "cuda_on_cpu.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "../../csrc/kernels/backend.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Switches to another stack: saves the callee-saved registers on the old stack, and its pointer in `from`.
// swapcontext() makes two system calls for this, and the tests switch stacks a hundred million times.
extern "C" void wakesleep_switch_stack(void** from, void* to);
extern "C" void wakesleep_start_fiber();  // on aarch64 only

namespace cuda_on_cpu {
namespace {

// Set by the tests, for every launch that follows.
std::atomic<bool> shuffled = false;     // picks a random runnable thread instead of the first
std::atomic<int64_t> max_blocks = 0;    // cuts the grid to this many blocks, if positive; kernels use grid-stride loops
std::atomic<int64_t> launch_count = 0;  // launches so far

constexpr size_t kStackBytes = 256 << 10;

#if defined(__x86_64__)
asm(R"(
.pushsection .text
.globl wakesleep_switch_stack
.hidden wakesleep_switch_stack
.type wakesleep_switch_stack, @function
wakesleep_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size wakesleep_switch_stack, . - wakesleep_switch_stack
.popsection
)");

// Prepares a new stack: zeros for registers, the function to begin with, and a zero that ends backtraces.
void** prepare_stack(void** top, void (*enter)()) {
  top[-2] = reinterpret_cast<void*>(enter);
  return top - 8;
}
#elif defined(__aarch64__)
asm(R"(
.pushsection .text
.globl wakesleep_switch_stack
.hidden wakesleep_switch_stack
.type wakesleep_switch_stack, %function
wakesleep_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size wakesleep_switch_stack, . - wakesleep_switch_stack

.globl wakesleep_start_fiber
.hidden wakesleep_start_fiber
.type wakesleep_start_fiber, %function
wakesleep_start_fiber:
  mov x30, xzr
  br x19
.popsection
)");

// Prepares a new stack: x19 holds the function to begin with. Its return address is zero, so backtraces end there.
void** prepare_stack(void** top, void (*enter)()) {
  top -= 20;
  top[0] = reinterpret_cast<void*>(enter);
  top[11] = reinterpret_cast<void*>(&wakesleep_start_fiber);
  return top;
}
#else
#error "cuda_on_cpu: expected x86-64 or aarch64"
#endif

// A stack to run on. The address sanitizer is told of every switch.
struct Context {
  void* pointer = nullptr;  // valid while another context runs
  const void* bottom = nullptr;
  size_t bytes = 0;

  void switch_to(Context& next) {
    left = this;
#ifdef __SANITIZE_ADDRESS__
    void* shadow = nullptr;
    __sanitizer_start_switch_fiber(&shadow, next.bottom, next.bytes);
    wakesleep_switch_stack(&pointer, next.pointer);
    arrive(shadow);
#else
    wakesleep_switch_stack(&pointer, next.pointer);
#endif
  }

  // Runs on the new stack after a switch, and records the bounds of the stack that was left.
  static void arrive([[maybe_unused]] void* shadow) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(shadow, &left->bottom, &left->bytes);
#endif
  }

  inline static Context* left = nullptr;
};

// A GPU thread. The next block reuses its stack.
struct Fiber : Context {
  unsigned index = 0;  // in the block
  const char* waits_at = nullptr;
  bool finished = false;

  explicit Fiber(void (*enter)()) {
    bytes = kStackBytes;
    void* stack = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (stack == MAP_FAILED) {
      fail("no memory for the stacks of a block");
    }
    bottom = stack;
    pointer = prepare_stack(reinterpret_cast<void**>(static_cast<char*>(stack) + bytes), enter);
  }

  ~Fiber() {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(bottom, bytes);  // frames that have not returned
#endif
    munmap(const_cast<void*>(bottom), bytes);
  }

  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
};

// Values that the lanes of a warp exchange. The slot is free once every member has read them.
struct Exchange {
  unsigned members = 0, arrived = 0, unread = 0;
  Shown shown = {};
};

// Runs the threads of a block, and keeps track of what they wait for.
class Block {
 public:
  void run(unsigned threads, const std::function<void()>& thread) {
    body_ = &thread;
    threads_ = threads;
    random_.seed(blockIdx.x);
    runnable_.clear();
    at_barrier_ = 0;
    warps_.resize((threads + 31) / 32);
    for (unsigned warp = 0; warp < warps_.size(); ++warp) {
      warps_[warp] = {shuffled ? random_() >> 32 << 32 : uint64_t{warp} << 32, {}};
    }
    while (fibers_.size() < threads) {
      fibers_.push_back(std::make_unique<Fiber>(&Block::enter));
      fibers_.back()->index = static_cast<unsigned>(fibers_.size() - 1);
    }
    for (unsigned t = 0; t < threads; ++t) {
      fibers_[t]->finished = false;
      wake(t);
    }
    current = this;
    next_of(host_);
    if (error_ != nullptr) {
      std::rethrow_exception(std::exchange(error_, nullptr));
    }
    for (unsigned t = 0; t < threads; ++t) {
      if (!fibers_[t]->finished) {
        fail("deadlock in block ", blockIdx.x, ": thread ", t, " waits at ", fibers_[t]->waits_at,
             " for threads that have returned or wait elsewhere");
      }
    }
  }

  void barrier() {
    if (++at_barrier_ == threads_) {
      at_barrier_ = 0;
      for (unsigned t = 0; t < threads_; ++t) {
        wake(t);
      }
    }
    wait("a barrier");
  }

  Shown exchange(unsigned members, uint64_t value) {
    const int lane = cuda_on_cpu::lane();
    if ((members >> lane & 1) == 0) {
      fail("lane ", lane, " takes part in a shuffle or vote whose mask excludes it");
    }
    const unsigned warp = threadIdx.x / 32;
    auto& exchanges = warps_[warp].exchanges;
    const auto is_open = [&](const Exchange& slot) { return slot.members == members && slot.arrived != members; };
    const auto is_free = [](const Exchange& slot) { return slot.members == 0; };
    auto slot = std::find_if(exchanges.begin(), exchanges.end(), is_open);
    if (slot == exchanges.end()) {  // this lane is the first of the members
      slot = std::find_if(exchanges.begin(), exchanges.end(), is_free);
      slot = slot == exchanges.end() ? exchanges.insert(slot, Exchange()) : slot;
      *slot = {members, 0, members, {}};
    }
    const auto index = slot - exchanges.begin();  // while this lane waits, others may add slots
    slot->shown[lane] = value;
    slot->arrived |= 1u << lane;
    if (slot->arrived == members) {
      for (unsigned other = 0; other < 32; ++other) {
        if ((members >> other & 1) != 0) {
          wake(warp * 32 + other);
        }
      }
    }
    wait("a shuffle or vote");
    Exchange& complete = exchanges[index];
    complete.unread &= ~(1u << lane);
    if (complete.unread == 0) {
      complete.members = 0;
    }
    return complete.shown;
  }

  inline static Block* current = nullptr;

 private:
  struct Warp {
    uint64_t priority;  // fixed for the block, so that a race between two warps shows
    std::vector<Exchange> exchanges;
  };

  static void enter() {
    Block& block = *current;
    Context::arrive(nullptr);
    for (;;) {
      Fiber& self = *block.running_;
      try {
        (*block.body_)();
      } catch (...) {
        block.error_ = std::current_exception();
      }
      self.finished = true;
      block.next_of(self);
    }
  }

  void wake(unsigned thread) {
    const uint64_t among_warp = shuffled ? random_() >> 32 : thread;
    runnable_.push_back({warps_[thread / 32].priority | among_warp, thread});
    std::push_heap(runnable_.begin(), runnable_.end(), std::greater<>());
  }

  void wait(const char* where) {
    Fiber& self = *running_;
    self.waits_at = where;
    next_of(self);
  }

  // Switches to the first runnable thread, or to the host if there is none or a thread has failed.
  void next_of(Context& self) {
    Context* next = &host_;
    if (!runnable_.empty() && error_ == nullptr) {
      std::pop_heap(runnable_.begin(), runnable_.end(), std::greater<>());
      running_ = fibers_[runnable_.back().second].get();
      runnable_.pop_back();
      threadIdx = {running_->index, 0, 0};
      next = running_;
    }
    if (next != &self) {
      self.switch_to(*next);
    }
  }

  unsigned threads_ = 0, at_barrier_ = 0;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  Context host_;
  Fiber* running_ = nullptr;
  std::vector<std::pair<uint64_t, unsigned>> runnable_;  // a heap of priorities and threads
  std::vector<Warp> warps_;
  const std::function<void()>* body_ = nullptr;
  std::exception_ptr error_;
  std::mt19937_64 random_;
};

}  // namespace

void barrier() { Block::current->barrier(); }

Shown exchange(unsigned members, uint64_t value) { return Block::current->exchange(members, value); }

void run(dim3 grid, dim3 block, const std::function<void()>& thread) {
  if (grid.x < 1 || grid.y != 1 || grid.z != 1) {
    fail("expected a grid of at least 1 block, in x only");
  }
  if (block.x < 1 || block.x > 1024 || block.y != 1 || block.z != 1) {
    fail("expected a block of 1 to 1024 threads, in x only");
  }
  ++launch_count;
  if (max_blocks > 0) {
    grid.x = std::min<int64_t>(grid.x, max_blocks);
  }
  static std::mutex one_launch;
  static std::unique_ptr<Block> threads;
  const std::lock_guard<std::mutex> lock(one_launch);
  if (threads == nullptr) {
    threads = std::make_unique<Block>();
  }
  blockDim = block;
  gridDim = grid;
  std::exception_ptr error;
  std::thread([&] {
    try {
      for (unsigned b = 0; b < grid.x; ++b) {
        blockIdx = {b, 0, 0};
        threads->run(block.x, thread);
      }
    } catch (...) {
      error = std::current_exception();
      threads = nullptr;  // drops the fibers that have not returned
    }
  }).join();
  if (error != nullptr) {
    std::rethrow_exception(error);
  }
}

}  // namespace cuda_on_cpu

void wakesleep::cuda::check_launch(int error) {
  if (error != cudaSuccess) {
    cuda_on_cpu::fail("a launch failed with error ", error);
  }
}

bool wakesleep::cuda::launches_early() { return true; }

// What the package needs to compute with the emulated kernels.
CUDA_ON_CPU_EXPORT const void* wakesleep_cuda_kernels() { return &wakesleep::cuda::kBackend; }

CUDA_ON_CPU_EXPORT void schedule(bool is_shuffled, int64_t blocks) {
  cuda_on_cpu::shuffled = is_shuffled;
  cuda_on_cpu::max_blocks = blocks;
}

CUDA_ON_CPU_EXPORT int64_t launches() { return cuda_on_cpu::launch_count; }
