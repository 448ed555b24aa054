// Activation functions y = f(a) of a layer, for host and device. The gradient of a is computed from y and the gradient
// of y, so a layer saves only y for its backward pass.
#pragma once

#include <optional>
#include <string_view>
#include <variant>

#include "checks.h"
#include "densities.h"

namespace wakesleep {

struct Identity {
  template <typename T>
  WAKESLEEP_FUNCTION T operator()(T a) const {
    return a;
  }
  template <typename T>
  WAKESLEEP_FUNCTION T gradient(T upstream, T) const {
    return upstream;
  }
};

struct Relu {
  template <typename T>
  WAKESLEEP_FUNCTION T operator()(T a) const {
    return a < T(0) ? T(0) : a;  // NaN passes through
  }
  template <typename T>
  WAKESLEEP_FUNCTION T gradient(T upstream, T y) const {
    return y <= T(0) ? T(0) : upstream;
  }
};

struct Sigmoid {
  template <typename T>
  WAKESLEEP_FUNCTION T operator()(T a) const {
    return wakesleep::sigmoid(a);
  }
  template <typename T>
  WAKESLEEP_FUNCTION T gradient(T upstream, T y) const {
    return upstream * (y * (1 - y));
  }
};

struct Tanh {
  template <typename T>
  WAKESLEEP_FUNCTION T operator()(T a) const {
    return wakesleep::tanh(a);
  }
  template <typename T>
  WAKESLEEP_FUNCTION T gradient(T upstream, T y) const {
    return upstream * (1 - y * y);
  }
};

using Activation = std::variant<Identity, Relu, Sigmoid, Tanh>;

// Returns the activation with this name, or Identity if no name is given.
inline Activation activation_of(const char* op, const char* argument, std::optional<std::string_view> name) {
  if (!name) {
    return Identity{};
  }
  if (*name == "relu") {
    return Relu{};
  }
  if (*name == "sigmoid") {
    return Sigmoid{};
  }
  TORCH_CHECK_VALUE(*name == "tanh", op, ": expected ", argument, " to be None, 'relu', 'sigmoid' or 'tanh', got '",
                    *name, "'");
  return Tanh{};
}

}  // namespace wakesleep
