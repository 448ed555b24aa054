// Implements exp, log, tanh, sine and cosine as straight-line arithmetic. CPU and GPU share the source.
//
// On the CPU, the functions are polynomials without branches, tables or calls, so a loop around them vectorises at any
// width. The compiler is not allowed to fuse multiply-adds, so a loop returns the same bits at every vector width. On a
// GPU, exp and tanh are CUDA's own functions. The GPU compiler may fuse multiply-adds, which changes a result by an ulp
// or two.
//
// The coefficients are minimax fits (Remez exchange, 50 digits). tests/test_elementary.py compares the functions with
// extended precision. The largest allowed error is 1.6 ulp for exp and log, 2 ulp for cosine and sine, and 2.5 ulp for
// tanh.
#pragma once

#include <c10/macros/Macros.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define WAKESLEEP_FUNCTION C10_HOST_DEVICE C10_ALWAYS_INLINE

namespace wakesleep {

template <typename To, typename From>
WAKESLEEP_FUNCTION To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename T>
struct Pair {
  T first, second;
};

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

template <typename T>
WAKESLEEP_FUNCTION T power_of_two(typename Format<T>::Int exponent) {
  return bit_cast<T>((exponent + Format<T>::exponent_bias) << Format<T>::mantissa_bits);
}

// Splits e^x into value * 2^exponent, with `value` in [0.7, 1.42].
template <typename T>
struct SplitExp {
  T value;
  T less_one;                       // value - 1, without the rounding error of adding 1
  typename Format<T>::Int shifted;  // exponent + origin

  static constexpr typename Format<T>::Int origin =
      sizeof(T) == 4 ? 0x4b400000 : static_cast<typename Format<T>::Int>(0x4338000000000000);  // bits of round_shift

  WAKESLEEP_FUNCTION explicit SplitExp(T x) {
    using F = Format<T>;
    const T sum = x * T(1.4426950408889634074) + F::round_shift;
    const T n = sum - F::round_shift;
    const T r = (x - n * F::ln2_high) - n * F::ln2_low;
    less_one = F::exp_tail(r) * (r * r) + r;
    value = less_one + T(1);
    shifted = bit_cast<typename F::Int>(sum);
  }

  // The result is meaningless if e^x is out of range.
  WAKESLEEP_FUNCTION typename Format<T>::Int exponent() const { return shifted - origin; }
};

// Returns e^x within 1.6 ulp. In float32, the result is inf if e^x >= 2^127.5, and 0 if e^x < 2^-126.5. In float64,
// these limits are 2^1023.5 and 2^-1022.5. On a GPU, results overflow and underflow as IEEE 754 specifies.
template <typename T>
WAKESLEEP_FUNCTION T exp(T x) {
#ifdef __CUDA_ARCH__
  return ::exp(x);
#else
  using F = Format<T>;
  const SplitExp<T> split(x);
  // If the exponent is out of range, `power` is 0 or inf. The result is then `power`, unless x is NaN.
  constexpr typename F::Int least = SplitExp<T>::origin - F::exponent_bias, most = least + 2 * F::exponent_bias + 1;
  const auto above = split.shifted < least ? least : split.shifted;
  const T power = bit_cast<T>(typename F::Int((above > most ? most : above) - least) << F::mantissa_bits);
  return std::abs(x) > F::exp_max ? power : split.value * power;
#endif
}

// Returns e^x for x <= 0, which cannot overflow. On the CPU, subnormal results are flushed to 0.
template <typename T>
WAKESLEEP_FUNCTION T exp_of_nonpositive(T x) {
#ifdef __CUDA_ARCH__
  return ::exp(x);
#else
  const SplitExp<T> split(x);
  return x < Format<T>::exp_normal_min ? T(0) : split.value * power_of_two<T>(split.exponent());
#endif
}

// Returns tanh(x) within 2.5 ulp. With e = exp(-2|x|) - 1, the absolute value is -e / (e + 2).
template <typename T>
WAKESLEEP_FUNCTION T tanh(T x) {
#ifdef __CUDA_ARCH__
  return ::tanh(x);
#else
  constexpr T one_from = sizeof(T) == 4 ? 10 : 20;  // tanh(x) rounds to 1 from here on
  const T magnitude = std::abs(x) > one_from ? one_from : std::abs(x);
  const SplitExp<T> split(T(-2) * magnitude);
  const T power = power_of_two<T>(split.exponent());
  const T e = power * split.less_one + (power - T(1));
  return std::copysign(e / (e + T(2)), x);
#endif
}

// Returns 1 + e^x for x <= 0. On a GPU, the error of the fast power of two is smaller than the rounding error of the
// sum.
template <typename T>
WAKESLEEP_FUNCTION T one_plus_exp(T x) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, float>) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.4426950408889634074f));
    return 1.0f + power;
  }
#endif
  return T(1) + exp_of_nonpositive(x);
}

// Returns a / b for b in [1, 2].
template <typename T>
WAKESLEEP_FUNCTION T divide(T a, T b) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, float>) {
    return __fdividef(a, b);  // within 2 ulp for b in [1, 2], with a fifth of the instructions of a / b
  }
#endif
  return a / b;
}

// Returns sqrt(x) for x >= 0, within 1 ulp.
template <typename T>
WAKESLEEP_FUNCTION T square_root(T x) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, float>) {
    float root;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));  // correct rounding would need a branch
    return root;
  }
#endif
  return std::sqrt(x);
}

// Returns ln(x) for positive normal x, within 1.6 ulp. For any other x, the result is finite but wrong. Callers must
// exclude such x.
template <typename T>
WAKESLEEP_FUNCTION T log_of_normal(T x) {
  using F = Format<T>;
  using Int = typename F::Int;
  const Int bits = bit_cast<Int>(x);
  const Int exponent =
      (bits - F::sqrt_half) >> F::mantissa_bits;  // x = 2^exponent (1 + f), sqrt(1/2) <= 1 + f < sqrt(2)
  const T f = bit_cast<T>(Int(bits - exponent * (Int(1) << F::mantissa_bits))) - T(1);
  const T n = T(exponent);
  if constexpr (std::is_same_v<T, float>) {
    const float f2 = f * f;
    const float low = polynomial(f, 0.33333316784342276117f, -0.25000796563698413202f, 0.20002282533649927264f,
                                 -0.16624969892975970781f, 0.14181419950105084613f, -0.13125294686450069448f,
                                 0.12879201465639841252f, -0.078654531604554033108f) *
                          f * f2 +
                      n * F::ln2_low;
    return (low - 0.5f * f2) + f + n * F::ln2_high;
  } else {
    const double s = f / (f + 2.0);  // ln(1+f) = 2 artanh(s) = f - s (f - 2 (artanh(s)/s - 1))
    const double s2 = s * s;
    const double remainder =
        polynomial(s2, 0.66666666666666661398, 0.40000000000005967686, 0.28571428569153080125, 0.22222222638811322538,
                   0.18181776185682280512, 0.15387071839903913241, 0.13250478412386419735, 0.13248531083417106519) *
        s2;
    return (n * F::ln2_low - s * (f - remainder)) + f + n * F::ln2_high;
  }
}

// Returns the cosine and the sine of an angle. The angle is `turn` / 2^bits full turns, where `bits` is the size of the
// integer type. The reduction to an eighth of a turn uses integer arithmetic and is therefore exact. The errors are at
// most 2 ulp of the larger component.
template <typename T>
WAKESLEEP_FUNCTION Pair<T> cos_sin_of_turn(typename Format<T>::Int turn) {
  using F = Format<T>;
  using Int = typename F::Int;
  using UInt = std::make_unsigned_t<Int>;
  constexpr int bits = 8 * sizeof(Int);
  const UInt quarter = (UInt(turn) + (UInt(1) << (bits - 3))) >> (bits - 2);  // nearest quarter turn, 0..3
  const Int rest = Int(UInt(turn) - (quarter << (bits - 2)));
  constexpr T radians = T(6.283185307179586476925) / (T(2) * T(UInt(1) << (bits - 1)));
  const T r = T(rest) * radians;
  const T t = r * r;
  const T sine = F::sin_tail(t) * (t * r) + r;
  const T cosine = F::cos_tail(t) * (t * t) - T(0.5) * t + T(1);
  const bool odd = (quarter & 1) != 0;
  const T c = odd ? sine : cosine;
  const T s = odd ? cosine : sine;
  return {((quarter + 1) & 2) != 0 ? -c : c, (quarter & 2) != 0 ? -s : s};
}

}  // namespace wakesleep
