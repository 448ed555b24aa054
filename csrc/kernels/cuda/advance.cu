// Counters are few and short, so one block advances all of them.
#include "../advance.h"

#include "launch.cuh"

namespace wakesleep::cuda {
namespace {

// The number of counters per launch. They must fit in the 4 KB of kernel arguments that every GPU allows.
constexpr int64_t kCounters = 64;

struct Counters {
  Counter counter[kCounters];
  int64_t count;
};
static_assert(sizeof(Counters) <= 4096);

__global__ void __launch_bounds__(kBlockThreads) advance(const Counters counters) {
  wait_for_previous();
  for (int64_t c = 0; c < counters.count; ++c) {
    const Counter& counter = counters.counter[c];
    for (int64_t i = threadIdx.x; i < counter.size; i += kBlockThreads) {
      counter.advance(i);
    }
  }
}

}  // namespace

void compute(const Advance& call, Stream stream) {
  for (int64_t first = 0; first < call.count; first += kCounters) {
    Counters counters = {{}, std::min(kCounters, call.count - first)};
    std::copy_n(call.counters + first, counters.count, counters.counter);
    launch(stream, advance, 1, kBlockThreads, counters);
  }
}

}  // namespace wakesleep::cuda
