// The number types of the kernels, and the dispatch from a dtype to a type. Each dispatch function calls
// body(Type<scalar_t>{}) once, for the given dtype. The host code has checked that the dtype is one of those that the
// function names.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "elementary.h"

namespace wakesleep {

enum class Dtype : uint8_t { float64, float32, bfloat16, float16, uint8 };

// An IEEE 754 half-precision number in memory. Arithmetic is in float32. A NaN loses its payload.
struct Half {
  uint16_t bits;

  Half() = default;
  WAKESLEEP_FUNCTION explicit Half(float value);
  WAKESLEEP_FUNCTION operator float() const;
};

// The upper half of a float32. Arithmetic is in float32. A NaN loses its payload.
struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  WAKESLEEP_FUNCTION explicit BFloat16(float value);
  WAKESLEEP_FUNCTION operator float() const;
};

// Rounds to the nearest number, ties to even. The two branches are selects. Adding 1/2 to a magnitude below 2^-14,
// where Half is subnormal, rounds it to a multiple of 2^-24 and leaves this multiple in the low bits. Above, the
// rounded part is added to the bits, and a carry increments the exponent.
WAKESLEEP_FUNCTION Half::Half(float value) {
#ifdef __CUDA_ARCH__
  bits = __half_as_ushort(__float2half(value));
#else
  const auto word = bit_cast<uint32_t>(value);
  const uint32_t magnitude = word & 0x7fffffff;
  const uint32_t small = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t normal = (magnitude + 0xc8000fff + (magnitude >> 13 & 1)) >> 13;  // the bias falls from 127 to 15
  const uint32_t large = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t finite = magnitude < 0x38800000 ? small : normal & 0x7fff;
  bits = static_cast<uint16_t>(word >> 16 & 0x8000) | static_cast<uint16_t>(magnitude < 0x47800000 ? finite : large);
#endif
}

WAKESLEEP_FUNCTION Half::operator float() const {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(bits));
#else
  const uint32_t magnitude = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
  const auto small = bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t normal = (magnitude << 13) + (magnitude < 0x7c00 ? 0x38000000u : 0x70000000u);
  return bit_cast<float>(sign | (magnitude < 0x0400 ? small : normal));
#endif
}

WAKESLEEP_FUNCTION BFloat16::BFloat16(float value) {
#ifdef __CUDA_ARCH__
  bits = __bfloat16_as_ushort(__float2bfloat16(value));
#else
  const auto word = bit_cast<uint32_t>(value);
  const uint32_t rounded = (word + 0x7fff + (word >> 16 & 1)) >> 16;
  bits = static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
#endif
}

WAKESLEEP_FUNCTION BFloat16::operator float() const {
#ifdef __CUDA_ARCH__
  return __bfloat162float(__ushort_as_bfloat16(bits));
#else
  return bit_cast<float>(static_cast<uint32_t>(bits) << 16);
#endif
}

// The type in which a kernel computes with numbers of type T: float for the 16-bit types, otherwise T.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>, float, T>;

template <typename T>
struct Type {
  using type = T;
};

template <typename Body>
void dispatch_floating(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::float64:
      return body(Type<double>{});
    case Dtype::bfloat16:
      return body(Type<BFloat16>{});
    case Dtype::float16:
      return body(Type<Half>{});
    default:
      return body(Type<float>{});
  }
}

// For the compute types, float64 and float32.
template <typename Body>
void dispatch_computed(Dtype dtype, const Body& body) {
  dtype == Dtype::float64 ? body(Type<double>{}) : body(Type<float>{});
}

// Calls body(Type<parameter_t>{}, Type<value_t>{}). `value` is uint8, the parameters' dtype or their compute dtype.
template <typename Body>
void dispatch_floating_and_value(Dtype parameter, Dtype value, const Body& body) {
  dispatch_floating(parameter, [&](auto type) {
    using parameter_t = typename decltype(type)::type;
    if (value == Dtype::uint8) {
      return body(type, Type<uint8_t>{});
    }
    if constexpr (!std::is_same_v<parameter_t, Compute<parameter_t>>) {
      if (value == Dtype::float32) {
        return body(type, Type<float>{});
      }
    }
    return body(type, type);
  });
}

// Calls body(Type<compute_t>{}, Type<value_t>{}). `compute` is float64 or float32, and `value` is uint8 or the same.
template <typename Body>
void dispatch_computed_and_value(Dtype compute, Dtype value, const Body& body) {
  dispatch_computed(compute,
                    [&](auto type) { value == Dtype::uint8 ? body(type, Type<uint8_t>{}) : body(type, type); });
}

// Calls body(Type<parameter_t>{}, Type<written_t>{}). `written` is uint8 or the parameters' dtype.
template <typename Body>
void dispatch_floating_and_written(Dtype parameter, Dtype written, const Body& body) {
  dispatch_floating(parameter,
                    [&](auto type) { written == Dtype::uint8 ? body(type, Type<uint8_t>{}) : body(type, type); });
}

}  // namespace wakesleep
