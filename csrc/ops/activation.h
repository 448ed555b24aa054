// The activation that an op's argument names.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "../kernels/activations.h"

namespace wakesleep {

// Returns the activation with this name, or the identity if no name is given.
inline Activation activation_of(const char* op, const char* argument, std::optional<std::string_view> name) {
  if (!name) {
    return Activation::identity;
  }
  if (*name == "relu") {
    return Activation::relu;
  }
  if (*name == "sigmoid") {
    return Activation::sigmoid;
  }
  TORCH_CHECK_VALUE(*name == "tanh", op, ": expected ", argument, " to be None, 'relu', 'sigmoid' or 'tanh', got '",
                    *name, "'");
  return Activation::tanh;
}

}  // namespace wakesleep
