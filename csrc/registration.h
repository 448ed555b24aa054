// Registers kernels with torch. WAKESLEEP_KERNELS replaces TORCH_LIBRARY_IMPL, so that files with kernels need not
// include <torch/library.h>, which takes 7 s to compile.
//
//   WAKESLEEP_KERNELS(CPU, m) { m.impl("gaussian_kl", gaussian_kl); }
#pragma once

#include <ATen/core/Tensor.h>

namespace torch {
class Library;
}

namespace wakesleep {

// Registers the kernels of one dispatch key.
class Registrar {
 public:
  explicit Registrar(torch::Library& library) : library_(library) {}

  // The signature must be in the list in registration.cpp. Otherwise the extension does not load.
  template <typename Signature>
  void impl(const char* name, Signature* kernel);

 private:
  torch::Library& library_;
};

struct Registration {
  Registration(c10::DispatchKey key, void (*implement)(Registrar&), const char* file, uint32_t line);
};

}  // namespace wakesleep

#define WAKESLEEP_KERNELS(key, m)                                                                             \
  static void implement_kernels(::wakesleep::Registrar&);                                                     \
  static const ::wakesleep::Registration kRegistration(::c10::DispatchKey::key, &implement_kernels, __FILE__, \
                                                       __LINE__);                                             \
  static void implement_kernels(::wakesleep::Registrar& m)
