// Correct kernels, and kernels with the errors that the emulation must detect.
#include <map>
#include <string>

#include "cuda_on_cpu.h"

namespace {

constexpr int kThreads = 64;

using Kernel = void(const float* from, float* to);

// Reverses a block through shared memory.
template <bool with_barrier>
void reverse(const float* from, float* to) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = from[threadIdx.x];
  if (with_barrier) {
    __syncthreads();
  }
  to[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

// Reverses twice through one tile. The second write to the tile must wait for the reads of the first.
template <bool with_barrier>
void reverse_twice(const float* from, float* to) {
  __shared__ float tile[kThreads];
  float value = from[threadIdx.x];
  for (int turn = 0; turn < 2; ++turn) {
    if (with_barrier || turn == 0) {
      __syncthreads();
    }
    tile[threadIdx.x] = value;
    __syncthreads();
    value = tile[kThreads - 1 - threadIdx.x];
  }
  to[threadIdx.x] = value;
}

void sum_of_teams(const float* from, float* to) {  // of 8 threads
  float sum = from[threadIdx.x];
  for (int distance = 4; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(0xffu << (threadIdx.x % 32 / 8 * 8), sum, distance);
  }
  to[threadIdx.x] = sum;
}

void votes(const float* from, float* to) {
  const bool positive = from[threadIdx.x] > 0;
  const unsigned ballot = __ballot_sync(0xffffffff, positive);
  to[threadIdx.x] = __any_sync(0xffffffff, positive) + 2 * __all_sync(0xffffffff, positive) +
                    4 * (__shfl_sync(0xffffffff, ballot, 31) == ballot) + 8 * (ballot >> threadIdx.x % 32 & 1);
}

void divergent_barrier(const float*, float*) {
  if (threadIdx.x != 5) {
    __syncthreads();
  }
}

void shuffle_of_others(const float* from, float* to) {
  to[threadIdx.x] = __shfl_sync(0x0000ffff, from[threadIdx.x], 0);
}

void shuffle_beyond_members(const float* from, float* to) {
  to[threadIdx.x] = __shfl_xor_sync(0xffu << (threadIdx.x % 32 / 8 * 8), from[threadIdx.x], 8);
}

void misaligned(const float* from, float* to) {
  *reinterpret_cast<uint4*>(to) = __ldg(reinterpret_cast<const uint4*>(from + 1));
}

void past_the_end(const float* from, float* to) { to[threadIdx.x] = from[threadIdx.x + 1]; }

const std::map<std::string, Kernel*> kKernels = {
    {"reverse", reverse<true>},
    {"reverse_without_barrier", reverse<false>},
    {"reverse_twice", reverse_twice<true>},
    {"reverse_twice_without_barrier", reverse_twice<false>},
    {"sum_of_teams", sum_of_teams},
    {"votes", votes},
    {"divergent_barrier", divergent_barrier},
    {"shuffle_of_others", shuffle_of_others},
    {"shuffle_beyond_members", shuffle_beyond_members},
    {"misaligned", misaligned},
    {"past_the_end", past_the_end},
};

}  // namespace

// Runs a kernel on kThreads numbers. Returns the message of the error, which lives until the next call, or null.
CUDA_ON_CPU_EXPORT const char* run_case(const char* name, const float* from, float* to) {
  thread_local std::string message;
  try {
    const cudaLaunchConfig_t config{dim3{1}, dim3{kThreads}};
    cudaLaunchKernelEx(&config, kKernels.at(name), from, to);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
