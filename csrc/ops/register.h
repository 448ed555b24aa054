// Registers the host code of ops for the CPU and, if the CUDA kernels are compiled, for CUDA.
//
//   WAKESLEEP_OPS(m) { m.impl("gaussian_kl", gaussian_kl); }
#pragma once

#include <torch/library.h>

#include <vector>

namespace wakesleep {

struct Registration {
  std::vector<torch::Library> libraries;

  Registration(void (*implement)(torch::Library&), const char* file, uint32_t line) {
    for (const auto key : {
             c10::DispatchKey::CPU,
#ifdef WAKESLEEP_CUDA_VERSION
             c10::DispatchKey::CUDA,
#endif
         }) {
      implement(libraries.emplace_back(torch::Library::IMPL, "wakesleep_ext", key, file, line));
    }
  }
};

}  // namespace wakesleep

#define WAKESLEEP_OPS(m) \
  WAKESLEEP_OPS_NAMED(m, C10_CONCATENATE(implement_, C10_UID), C10_CONCATENATE(registered_, C10_UID))
#define WAKESLEEP_OPS_NAMED(m, implement, registered)                                \
  static void implement(torch::Library& m);                                          \
  static const ::wakesleep::Registration registered(&implement, __FILE__, __LINE__); \
  static void implement(torch::Library& m)
