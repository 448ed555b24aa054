// Runs kernels on the device of their tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include "kernels/backend.h"

namespace wakesleep {

// Returns the backend for tensors on this device. A build without CUDA refuses CUDA tensors earlier (schemas.cpp).
const Backend& backend_of(at::Device device);

// Makes a backend compute on CPU tensors: the tests run the CUDA kernels in this way. Null restores the CPU's own.
void use_on_cpu(const Backend* backend);

// Returns the current stream of a CUDA device, or null for the CPU.
Stream current_stream(at::Device device);

// Runs a kernel on the current stream of the device, which holds all tensors of the call.
template <typename Call>
void launch(at::Device device, Kernel<Call> kernel, const Call& call) {
  c10::OptionalDeviceGuard guard;
  if (device.is_cuda()) {
    guard.reset_device(device);
  }
  kernel(call, current_stream(device));
}

template <typename Call>
void compute(at::Device device, const Call& call) {
  launch(device, std::get<Kernel<Call>>(backend_of(device).kernels), call);
}

inline Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return Dtype::float64;
    case at::kFloat:
      return Dtype::float32;
    case at::kBFloat16:
      return Dtype::bfloat16;
    case at::kHalf:
      return Dtype::float16;
    case at::kByte:
      return Dtype::uint8;
    default:
      TORCH_INTERNAL_ASSERT(false, "no kernel computes with ", type);
  }
}

inline Dtype dtype_of(const at::Tensor& tensor) { return dtype_of(tensor.scalar_type()); }

// Returns the dtype in which a kernel computes with numbers of this dtype: float32 for the 16-bit dtypes.
inline at::ScalarType compute_dtype(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

// Returns the pointer to a tensor's elements, or null if the tensor is undefined.
inline const void* read(const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }
inline void* write(const at::Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr() : nullptr; }

// Returns the pointer to the element at an offset from a tensor's first element, or null if the tensor is undefined.
inline const void* read(const at::Tensor& tensor, int64_t offset) {
  return tensor.defined() ? static_cast<const char*>(read(tensor)) + offset * tensor.element_size() : nullptr;
}
inline void* write(const at::Tensor& tensor, int64_t offset) {
  return tensor.defined() ? static_cast<char*>(write(tensor)) + offset * tensor.element_size() : nullptr;
}

}  // namespace wakesleep
