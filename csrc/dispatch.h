// Maps run-time dtypes to compile-time types. Each function calls body(Type<scalar_t>{}) once, for the given dtype.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>

namespace wakesleep {

template <typename T>
struct Type {
  using type = T;
};

template <typename Body>
void dispatch_floating(const char* op, at::ScalarType type, const Body& body) {
  switch (type) {
    case at::kFloat:
      return body(Type<float>{});
    case at::kDouble:
      return body(Type<double>{});
    case at::kHalf:
      return body(Type<at::Half>{});
    case at::kBFloat16:
      return body(Type<at::BFloat16>{});
    default:
      TORCH_CHECK_TYPE(false, op, ": expected a floating dtype, got ", type);
  }
}

template <typename Body>
void dispatch_half(at::ScalarType type, const Body& body) {
  if (type == at::kHalf) {
    return body(Type<at::Half>{});
  }
  body(Type<at::BFloat16>{});
}

// Like dispatch_floating, but only for the compute types, float and double.
template <typename Body>
void dispatch_computed(at::ScalarType type, const Body& body) {
  if (type == at::kDouble) {
    return body(Type<double>{});
  }
  body(Type<float>{});
}

// Calls body(Type<parameter_t>{}, Type<value_t>{}). value_t is uint8, the parameters' type or their compute type.
template <typename Body>
void dispatch_floating_and_value(const char* op, at::ScalarType parameter, at::ScalarType value, const Body& body) {
  dispatch_floating(op, parameter, [&](auto type) {
    using parameter_t = typename decltype(type)::type;
    using compute_t = at::opmath_type<parameter_t>;
    if (value == at::kByte) {
      return body(type, Type<uint8_t>{});
    }
    if constexpr (!std::is_same_v<parameter_t, compute_t>) {
      if (value == c10::CppTypeToScalarType<compute_t>::value) {
        return body(type, Type<compute_t>{});
      }
    }
    return body(type, type);
  });
}

}  // namespace wakesleep
