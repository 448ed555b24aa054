// The conversions of binary values that the Bernoulli ops share.
#pragma once

#include "../backend.h"
#include "geometry.h"

namespace wakesleep {

// Converts x to a dtype that the kernels read: uint8, the dtype of the parameters, or their compute dtype.
inline at::Tensor observation(const char* op, const at::Tensor& x, at::ScalarType parameters) {
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kBool || type == at::kByte || at::isFloatingType(type), op,
                   ": expected x to be bool, uint8 or floating, got ", type);
  if (type == at::kBool) {
    return with_contiguous_events(x.view(at::kByte).ne(0).view(at::kByte));  // any nonzero byte is true
  }
  return with_contiguous_events(type == at::kByte || type == parameters ? x : x.to(compute_dtype(parameters)));
}

// Returns the dtype that the kernels write if the caller requests `dtype`: `dtype` itself if it is the parameters'
// dtype, and uint8 otherwise.
inline at::ScalarType written_dtype(const char* op, at::ScalarType dtype, at::ScalarType parameters) {
  TORCH_CHECK_TYPE(dtype == at::kBool || dtype == at::kByte || at::isFloatingType(dtype), op,
                   ": expected dtype to be bool, uint8 or floating, got ", dtype);
  return dtype == parameters ? dtype : at::kByte;
}

// Converts a tensor of zeros and ones to the requested dtype. The conversion from uint8 to bool returns a view.
inline at::Tensor as_dtype(const at::Tensor& zeros_and_ones, at::ScalarType dtype) {
  return dtype == at::kBool ? zeros_and_ones.view(at::kBool) : zeros_and_ones.to(dtype);
}

}  // namespace wakesleep
