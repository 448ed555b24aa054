// The layout of floating types, and the polynomials that elementary.h evaluates in each.
//
// The coefficients are minimax fits (Remez exchange, 50 digits).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define WAKESLEEP_INLINE inline __attribute__((always_inline))
#ifdef __CUDACC__
#define WAKESLEEP_FUNCTION __host__ __device__ WAKESLEEP_INLINE
#else
#define WAKESLEEP_FUNCTION WAKESLEEP_INLINE
#endif

namespace wakesleep {

template <typename To, typename From>
WAKESLEEP_FUNCTION To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// Returns c0 + c1 t + c2 t^2 + ..., evaluated by Horner's rule.
template <typename T>
WAKESLEEP_FUNCTION T polynomial(T, T c) {
  return c;
}

template <typename T, typename... Rest>
WAKESLEEP_FUNCTION T polynomial(T t, T c, Rest... rest) {
  return polynomial(t, rest...) * t + c;
}

// Describes the bit layout of a floating type, and the polynomials fitted to its precision.
template <typename T>
struct Format;

template <>
struct Format<float> {
  using Int = int32_t;
  static constexpr int mantissa_bits = 23;
  static constexpr int exponent_bias = 127;
  static constexpr Int sqrt_half = 0x3f3504f3;     // the bits of sqrt(1/2)
  static constexpr float round_shift = 0x1.8p23f;  // adding it rounds to an integer, stored in the low bits
  static constexpr float ln2_high = 0x1.63p-1f;    // has few bits, so its product with an integer is exact
  static constexpr float ln2_low = -0x1.bd0106p-13f;
  static constexpr float exp_max = 88.3765f;          // above: e^x >= 2^127.5
  static constexpr float exp_normal_min = -87.3365f;  // below: e^x is subnormal
  // (e^r - 1 - r) / r^2 on |r| <= ln(2)/2
  static WAKESLEEP_FUNCTION float exp_tail(float t) {
    return polynomial(t, 0.49999993513758911768f, 0.16666520867326533839f, 0.041668380515715725163f,
                      0.0083687098664879608505f, 0.001381483438405213732f);
  }
  // (sin(r) - r) / r^3 and (cos(r) - 1 + r^2/2) / r^4 in t = r^2, |r| <= pi/4
  static WAKESLEEP_FUNCTION float sin_tail(float t) {
    return polynomial(t, -0.16666654967026608828f, 0.0083321785606778100162f, -0.00019517271388407042808f);
  }
  static WAKESLEEP_FUNCTION float cos_tail(float t) {
    return polynomial(t, 0.041666647061118680822f, -0.0013887374879304304628f, 0.000024439121396289674379f);
  }
};

template <>
struct Format<double> {
  using Int = int64_t;
  static constexpr int mantissa_bits = 52;
  static constexpr int exponent_bias = 1023;
  static constexpr Int sqrt_half = 0x3fe6a09e667f3bcd;
  static constexpr double round_shift = 0x1.8p52;
  static constexpr double ln2_high = 0x1.62e42fee00000p-1;
  static constexpr double ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double exp_max = 709.4362;
  static constexpr double exp_normal_min = -708.396;
  static WAKESLEEP_FUNCTION double exp_tail(double t) {
    return polynomial(t, 0.5000000000000000041, 0.16666666666666682946, 0.041666666666666113839,
                      0.0083333333333172930219, 0.0013888888889111273968, 0.00019841269895903711203,
                      0.000024801586930754588916, 2.7557235228020764205e-6, 2.7557580221592017866e-7,
                      2.5111938938077058298e-8, 2.0826819836553080902e-9);
  }
  static WAKESLEEP_FUNCTION double sin_tail(double t) {
    return polynomial(t, -0.16666666666666666642, 0.0083333333333333229568, -0.00019841269841255236625,
                      2.7557319214263266844e-6, -2.5052104927869094829e-8, 1.6058368448389560584e-10,
                      -7.578778453779659977e-13);
  }
  static WAKESLEEP_FUNCTION double cos_tail(double t) {
    return polynomial(t, 0.041666666666666612932, -0.0013888888888876073583, 0.000024801587290536293566,
                      -2.7557314622161068705e-7, 2.0875756320077745327e-9, -1.136120897514908268e-11);
  }
};

}  // namespace wakesleep
