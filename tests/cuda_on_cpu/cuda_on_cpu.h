// The parts of CUDA that csrc/kernels/cuda uses, in C++. The kernels compile unchanged and run on the CPU. The build
// includes this header before each .cu file.
//
// A launch runs its blocks one after the other. Shared memory begins as zeros, and a block sees the values that the
// previous block left. Every thread of a block is a fiber, which runs until it waits for others at a barrier, a shuffle
// or a vote. The schedule picks the next fiber. In order, it picks the first that can run, so each runs as far ahead as
// barriers allow. Shuffled, it picks any fiber of the foremost warp, with warps in random order. The emulation reports
// a wait that never ends, a lane that its mask excludes, and an address on which a GPU would fault.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <sstream>
#include <stdexcept>

// Marks a function that Python calls. All others are hidden.
#define CUDA_ON_CPU_EXPORT extern "C" __attribute__((visibility("default")))

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local  // every launch runs on a new host thread

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

// Throws an error whose message joins the parts.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

void run(dim3 grid, dim3 block, const std::function<void()>& thread);

// Waits for every thread of the block.
void barrier();

// Exchanges a value among the lanes in `members` and returns the values of all of them.
using Shown = std::array<uint64_t, 32>;
Shown exchange(unsigned members, uint64_t value);

inline int lane() { return static_cast<int>(threadIdx.x % 32); }

template <typename T>
T shown_by(int source, unsigned members, T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (source < 0 || source >= 32 || (members >> source & 1) == 0) {
    fail("a shuffle reads lane ", source, ", which is not among its members");
  }
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(members, bits)[source];
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
T* aligned(T* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % alignof(T) != 0) {
    fail("misaligned address: ", sizeof(T), " bytes at ", static_cast<const void*>(pointer));
  }
  return pointer;
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::barrier(); }

template <typename T>
T __shfl_xor_sync(unsigned members, T value, int distance) {
  return cuda_on_cpu::shown_by(cuda_on_cpu::lane() ^ distance, members, value);
}

template <typename T>
T __shfl_sync(unsigned members, T value, int source) {
  return cuda_on_cpu::shown_by(source, members, value);
}

inline unsigned __ballot_sync(unsigned members, bool predicate) {
  const auto shown = cuda_on_cpu::exchange(members, predicate);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    votes |= static_cast<unsigned>((members >> lane & 1) != 0 && shown[lane] != 0) << lane;
  }
  return votes;
}

inline bool __any_sync(unsigned members, bool predicate) { return __ballot_sync(members, predicate) != 0; }

inline bool __all_sync(unsigned members, bool predicate) { return __ballot_sync(members, predicate) == members; }

template <typename T>
T __ldg(const T* pointer) {
  return *cuda_on_cpu::aligned(pointer);
}

template <typename T>
void __stwb(T* pointer, T value) {
  *cuda_on_cpu::aligned(pointer) = value;
}

using std::min;

enum cudaError_t { cudaSuccess };
using cudaStream_t = void*;

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

// Each launch runs to its end, so there is nothing to wait for.
#define __CUDA_ARCH_LIST__ 900
inline void cudaGridDependencySynchronize() {}
inline void cudaTriggerProgrammaticLaunchCompletion() {}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  cuda_on_cpu::run(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
  return cudaSuccess;
}
