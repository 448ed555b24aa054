// Activation functions y = f(a) of a layer, for host and device. The gradient of a is computed from y and the gradient
// of y, so a layer saves only y for its backward pass.
#pragma once

#include "densities.h"
#include "numbers.h"

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

enum class Activation : uint8_t { identity, relu, sigmoid, tanh };

// Returns the gradient of a, given the gradient of y = f(a) and y.
template <typename T>
WAKESLEEP_FUNCTION T activation_gradient(Activation activation, T upstream, T y) {
  switch (activation) {
    case Activation::relu:
      return Relu{}.gradient(upstream, y);
    case Activation::sigmoid:
      return Sigmoid{}.gradient(upstream, y);
    case Activation::tanh:
      return Tanh{}.gradient(upstream, y);
    default:
      return upstream;
  }
}

// Calls body(f), where f is the function above.
template <typename Body>
auto dispatch_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::relu:
      return body(Relu{});
    case Activation::sigmoid:
      return body(Sigmoid{});
    case Activation::tanh:
      return body(Tanh{});
    default:
      return body(Identity{});
  }
}

// Calls body(f, Type<scalar_t>{}).
template <typename Body>
void dispatch_activation_and_floating(Activation activation, Dtype dtype, const Body& body) {
  dispatch_activation(activation, [&](auto f) { dispatch_floating(dtype, [&](auto type) { body(f, type); }); });
}

}  // namespace wakesleep
