#include "cuda_on_cpu.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <atomic>
#include <map>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {
namespace {

// Set by the tests, for every launch that follows.
std::atomic<bool> shuffled = false;     // any runnable thread goes on, rather than the first
std::atomic<int64_t> max_blocks = 0;    // the grid is cut to this many, if positive: kernels stride over their work
std::atomic<int64_t> launch_count = 0;  // so far

constexpr size_t kStackBytes = 256 << 10;

// A stack to run on; the address sanitizer is told of every change.
struct Context {
  ucontext_t machine = {};
  void* stack = nullptr;  // that of the host where it is null
  const void* bottom = nullptr;
  size_t bytes = 0;

  void switch_to(Context& next, bool for_good = false) {
#ifdef __SANITIZE_ADDRESS__
    void* shadow = nullptr;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &shadow, next.bottom, next.bytes);
    swapcontext(&machine, &next.machine);
    __sanitizer_finish_switch_fiber(shadow, nullptr, nullptr);
#else
    (void)for_good;
    swapcontext(&machine, &next.machine);
#endif
  }
};

struct Exchange {
  unsigned members, arrived = 0;
  Shown shown = {};
};

struct Fiber : Context {
  dim3 index;
  const char* waits_at = nullptr;
  bool finished = false;
};

// The threads of a block, and what they wait for.
class Block {
 public:
  explicit Block(dim3 size) : size_(size) {
    TORCH_CHECK(size.x >= 1 && size.x <= 1024 && size.y == 1 && size.z == 1, "blocks are of 1 to 1024 threads in x");
    fibers_.resize(size.x);
    for (unsigned t = 0; t < size.x; ++t) {
      Fiber& fiber = fibers_[t];
      fiber.index = {t, 0, 0};
      fiber.bytes = kStackBytes;
      fiber.stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
      TORCH_CHECK(fiber.stack != MAP_FAILED, "no memory for the stacks of a block");
      fiber.bottom = fiber.stack;
    }
  }

  ~Block() {
    for (const Fiber& fiber : fibers_) {
      munmap(fiber.stack, kStackBytes);
    }
  }

  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void run(const std::function<void()>& thread) {
    body_ = &thread;
    random_.seed(blockIdx.x);
    runnable_.clear();
    exchanges_.assign((size_.x + 31) / 32, {});
    warp_priority_.clear();
    for (unsigned warp = 0; warp < (size_.x + 31) / 32; ++warp) {
      warp_priority_.push_back(shuffled ? random_() >> 32 << 32 : uint64_t{warp} << 32);
    }
    at_barrier_.clear();
    for (Fiber& fiber : fibers_) {
      fiber.finished = false;
      getcontext(&fiber.machine);
      fiber.machine.uc_stack = {fiber.stack, 0, kStackBytes};
      makecontext(&fiber.machine, reinterpret_cast<void (*)()>(&Block::enter), 0);
      wake(fiber);
    }
    Block* const outer = std::exchange(current, this);
    while (!runnable_.empty() && error_ == nullptr) {
      running_ = runnable_.begin()->second;
      runnable_.erase(runnable_.begin());
      threadIdx = running_->index;
      host_.switch_to(*running_);
    }
    current = outer;
    if (error_ != nullptr) {
      std::rethrow_exception(std::exchange(error_, nullptr));
    }
    for (const Fiber& fiber : fibers_) {
      TORCH_CHECK(fiber.finished, "deadlock in block ", blockIdx.x, ": thread ", fiber.index.x, " waits at ",
                  fiber.waits_at, " for threads that have returned or wait elsewhere");
    }
  }

  void barrier() {
    at_barrier_.push_back(running_);
    if (at_barrier_.size() == fibers_.size()) {
      for (Fiber* fiber : std::exchange(at_barrier_, {})) {
        wake(*fiber);
      }
    }
    wait("a barrier");
  }

  Shown exchange(unsigned members, uint64_t value) {
    const int lane = cuda_on_cpu::lane();
    TORCH_CHECK((members >> lane & 1) != 0, "lane ", lane, " takes part in a shuffle or vote of others");
    auto& open = exchanges_[threadIdx.x / 32][members];
    if (open == nullptr) {
      open = std::make_shared<Exchange>(Exchange{members});
    }
    const auto mine = open;
    mine->shown[lane] = value;
    mine->arrived |= 1u << lane;
    if (mine->arrived == members) {
      open = nullptr;
      for (unsigned other = 0; other < 32; ++other) {
        if ((members >> other & 1) != 0) {
          wake(fibers_.at(threadIdx.x / 32 * 32 + other));
        }
      }
    }
    wait("a shuffle or vote");
    return mine->shown;
  }

  static thread_local Block* current;

 private:
  static void enter() {
    Block& block = *current;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &block.host_.bottom, &block.host_.bytes);
#endif
    try {
      (*block.body_)();
    } catch (...) {
      block.error_ = std::current_exception();
    }
    block.running_->finished = true;
    block.running_->switch_to(block.host_, true);
  }

  // A warp is ahead of another for as long as the block runs, lest a race between the two go unseen.
  void wake(Fiber& fiber) {
    const uint64_t priority = warp_priority_[fiber.index.x / 32];
    runnable_.emplace(priority | (shuffled ? random_() >> 32 : fiber.index.x), &fiber);
  }

  void wait(const char* where) {
    Fiber& self = *running_;
    self.waits_at = where;
    self.switch_to(host_);
  }

  const dim3 size_;
  std::vector<Fiber> fibers_;
  Context host_;
  Fiber* running_ = nullptr;
  std::multimap<uint64_t, Fiber*> runnable_;  // by priority
  std::vector<Fiber*> at_barrier_;
  std::vector<std::map<unsigned, std::shared_ptr<Exchange>>> exchanges_;  // of each warp, by members
  const std::function<void()>* body_ = nullptr;
  std::exception_ptr error_;
  std::vector<uint64_t> warp_priority_;
  std::mt19937_64 random_;
};

thread_local Block* Block::current = nullptr;

}  // namespace

void barrier() { Block::current->barrier(); }

Shown exchange(unsigned members, uint64_t value) { return Block::current->exchange(members, value); }

void run(dim3 grid, dim3 block, const std::function<void()>& thread) {
  TORCH_CHECK(grid.x >= 1 && grid.y == 1 && grid.z == 1, "grids are of 1 block or more, in x");
  ++launch_count;
  if (max_blocks > 0) {
    grid.x = std::min<int64_t>(grid.x, max_blocks);
  }
  Block threads(block);
  std::exception_ptr error;
  for (unsigned b = 0; b < grid.x && error == nullptr; ++b) {
    std::thread([&] {
      blockIdx = {b, 0, 0};
      blockDim = block;
      gridDim = grid;
      try {
        threads.run(thread);
      } catch (...) {
        error = std::current_exception();
      }
    }).join();
  }
  if (error != nullptr) {
    std::rethrow_exception(error);
  }
}

TORCH_LIBRARY(cuda_on_cpu, m) {
  m.def("schedule(bool shuffled, int max_blocks) -> ()", [](bool any, int64_t blocks) {
    shuffled = any;
    max_blocks = blocks;
  });
  m.def("launches() -> int", []() -> int64_t { return launch_count; });
}

}  // namespace cuda_on_cpu
