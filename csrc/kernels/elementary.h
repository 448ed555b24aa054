// Implements exp, log, tanh, sine and cosine as straight-line arithmetic. CPU and GPU share the source.
//
// On the CPU, the functions are polynomials without branches, tables or calls, so a loop around them vectorises at any
// width. The compiler is not allowed to fuse multiply-adds, so a loop returns the same bits at every vector width. On a
// GPU, exp and tanh are CUDA's own functions. The GPU compiler may fuse multiply-adds, which changes a result by an ulp
// or two.
//
// tests/test_elementary.py compares the functions with extended precision. The largest allowed error is 1.6 ulp for exp
// and log, 2 ulp for cosine and sine, and 2.5 ulp for tanh.
#pragma once

#include "float_format.h"

namespace wakesleep {

template <typename T>
struct Pair {
  T first, second;
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

// Returns e^x, with a relative error of at most 2^-22 + 2^-23 |x|. On a GPU, subnormal results are flushed to 0.
WAKESLEEP_FUNCTION float exp_approx(float x) {
#ifdef __CUDA_ARCH__
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.4426950408889634074f));
  return power;
#else
  return wakesleep::exp(x);
#endif
}

// Returns ln(u) for u in (0, 1], with a relative error of at most 2^-16.9. The fast logarithm to base 2 is within 2^-22
// for u > 1/2, which is not enough close to 1. There, 1 - u is exact, and a series is used instead.
WAKESLEEP_FUNCTION float log_of_uniform_approx(float u) {
#ifdef __CUDA_ARCH__
  float log2;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2) : "f"(u));
#else
  const float log2 = std::log2(u);
#endif
  const float rest = 1.0f - u;
  const float series = -rest * polynomial(rest, 1.0f, 0.5f, 0.33333333f);
  return rest < 0x1p-5f ? series : log2 * 0.69314718055994530942f;
}

// Returns the cosine and the sine of an angle, as cos_sin_of_turn does, with an absolute error of at most 2^-19.5. Of
// this, 2^-20.5 are the error of the fast functions, and 2^-21 that of the rounded angle, which lies in [-pi, pi].
WAKESLEEP_FUNCTION Pair<float> cos_sin_of_turn_approx(int32_t turn) {
  const float angle = float(turn) * (6.283185307179586476925f * 0x1p-32f);
#ifdef __CUDA_ARCH__
  return {__cosf(angle), __sinf(angle)};
#else
  return {std::cos(angle), std::sin(angle)};
#endif
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
