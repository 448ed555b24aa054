// What kernels/ needs of torch: threads, the choice of an instruction set, streams and errors of launches.
#include "backend.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#ifdef WAKESLEEP_CUDA_VERSION
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include "kernels/cpu/threads.h"
#include "settings.h"

namespace wakesleep {
namespace {

const Backend* on_cpu = &cpu::kBackend;

}  // namespace

void use_on_cpu(const Backend* backend) { on_cpu = backend == nullptr ? &cpu::kBackend : backend; }

#ifdef WAKESLEEP_CUDA_VERSION
const Backend& backend_of(at::Device device) { return device.is_cuda() ? cuda::kBackend : *on_cpu; }

Stream current_stream(at::Device device) {
  return device.is_cuda() ? static_cast<Stream>(c10::cuda::getCurrentCUDAStream(device.index())) : nullptr;
}

void cuda::check_launch(int error) {
  if (error == cudaErrorNoKernelImageForDevice) {
    (void)cudaGetLastError();
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "wakesleep_ext: none of the compiled kernels runs on this GPU; `wakesleep info` ",
                                "says which GPUs they were compiled for and how to reinstall them");
  }
  C10_CUDA_CHECK(static_cast<cudaError_t>(error));
}

bool cuda::launches_early() { return settings::dependent_launch.get().value_or(1) != 0; }
#else
const Backend& backend_of(at::Device) { return *on_cpu; }

Stream current_stream(at::Device) { return nullptr; }
#endif

cpu::InstructionSet cpu::instruction_set() {
  static const InstructionSet chosen = [] {
    const std::string capability = at::get_cpu_capability();
    if (capability.rfind("AVX512", 0) == 0) {
      return InstructionSet::avx512;
    }
    return capability == "AVX2" ? InstructionSet::avx2 : InstructionSet::baseline;
  }();
  return chosen;
}

void cpu::parallel_for(int64_t count, int64_t grain, void (*range)(const void*, int64_t, int64_t), const void* body) {
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { range(body, begin, end); });
}

}  // namespace wakesleep
