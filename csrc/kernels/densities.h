// Densities and their gradients for one coordinate. Host and device share one definition of each.
// Formulas: Kingma & Welling 2014, appendices B and C, with logvar = log sigma^2 and logits = log p / (1 - p).
#pragma once

#include "elementary.h"

namespace wakesleep {

constexpr double kLogTwoPi = 1.8378770664093454836;

// 1 / sigma = e^(-l/2).
template <typename T>
WAKESLEEP_FUNCTION T gaussian_inverse_sigma(T logvar) {
  return exp(T(-0.5) * logvar);
}

// log N(z; mu, e^l) = -1/2 (l + t^2 + log 2 pi) with t = (z - mu) e^(-l/2). The code squares t instead of multiplying
// (z - mu)^2 by e^(-l). So the exponential stays in the range of float32 for |l| up to 175.
template <typename T>
struct GaussianTerm {
  T standardized;   // t
  T inverse_sigma;  // e^(-l/2), which is the same for all values z of a row of parameters
  WAKESLEEP_FUNCTION GaussianTerm(T mu, T inverse_sigma, T z)
      : standardized((z - mu) * inverse_sigma), inverse_sigma(inverse_sigma) {}
  WAKESLEEP_FUNCTION T grad_mu() const { return standardized * inverse_sigma; }  // = -grad_z
  WAKESLEEP_FUNCTION T grad_logvar() const { return T(0.5) * (standardized * standardized - T(1)); }
};

// sigma = e^(l/2).
template <typename T>
WAKESLEEP_FUNCTION T gaussian_sigma(T logvar) {
  return exp(T(0.5) * logvar);
}

// Returns the log-density of a row, given the sum of (l + t^2) over its K coordinates.
template <typename T>
WAKESLEEP_FUNCTION T gaussian_log_prob_of_sum(T sum, int64_t K) {
  return T(-0.5) * (sum + T(kLogTwoPi) * T(K));
}

// Returns 2 KL(N(mu, e^l) || N(0, 1)) = mu^2 + e^l - 1 - l.
template <typename T>
WAKESLEEP_FUNCTION T twice_gaussian_kl(T mu, T logvar) {
  return mu * mu + (exp(logvar) - T(1) - logvar);
}

template <typename T>
WAKESLEEP_FUNCTION T gaussian_kl_grad_logvar(T logvar) {
  return T(0.5) * (exp(logvar) - T(1));
}

// KL(N(mu, e^l) || N(m, e^p)) = KL(N(t, e^d) || N(0, 1)) with t = (mu - m) e^(-p/2) and d = l - p. The code squares t,
// as in GaussianTerm, and subtracts the log-variances before it takes the exponential. So only a large ratio of the
// variances overflows, and equal Gaussians give exactly 0.
template <typename T>
struct GaussianKlTerm {
  GaussianTerm<T> mean;  // t, and the e^(-p/2) of the prior
  T log_ratio;           // d
  WAKESLEEP_FUNCTION GaussianKlTerm(T mu, T logvar, T prior_mu, T prior_logvar)
      : mean(prior_mu, gaussian_inverse_sigma(prior_logvar), mu), log_ratio(logvar - prior_logvar) {}
  WAKESLEEP_FUNCTION T twice_kl() const { return twice_gaussian_kl(mean.standardized, log_ratio); }
  WAKESLEEP_FUNCTION T grad_mu() const { return mean.grad_mu(); }  // = -grad_prior_mu
  WAKESLEEP_FUNCTION T grad_logvar() const { return gaussian_kl_grad_logvar(log_ratio); }
  WAKESLEEP_FUNCTION T grad_prior_logvar() const {
    return T(-0.5) * (mean.standardized * mean.standardized) - grad_logvar();
  }
};

// log p(x; a) = x a - softplus(a) = [x a - max(a, 0)] - log(1 + e^-|a|). The factors 1 + e^-|a| lie in (1, 2], so the
// code multiplies many factors and takes one logarithm of their product.
template <typename T>
struct BernoulliTerm {
  T linear;
  T factor;
  WAKESLEEP_FUNCTION BernoulliTerm(T a, T x) {
    const T magnitude = std::abs(a);
    linear = x * a - T(0.5) * (a + magnitude);
    factor = one_plus_exp(-magnitude);
  }
};

// The product of this many factors cannot overflow in float32.
constexpr int kFactorsPerLog = 96;

// d/da log p(x; a) = x - s(a), where s is the sigmoid. It is computed as one quotient, so there is no cancellation if x
// is binary.
template <typename T>
WAKESLEEP_FUNCTION T bernoulli_grad_logits(T a, T x) {
  const T e = exp_of_nonpositive(-std::abs(a));
  const T plain = a >= T(0) ? x - T(1) : x;
  const T scaled = a >= T(0) ? x : x - T(1);
  return divide(plain + scaled * e, T(1) + e);
}

// Returns s(a) = 1 / (1 + e^-a). The exponential cannot overflow.
template <typename T>
WAKESLEEP_FUNCTION T sigmoid(T a) {
  const T e = exp_of_nonpositive(-std::abs(a));
  return divide(a >= T(0) ? T(1) : e, T(1) + e);
}

// A Bernoulli draw is [u <= p] for a uniform u in (0, 1]. OfLogit computes the probability p from a logit.
struct OfLogit {
  template <typename T>
  WAKESLEEP_FUNCTION T operator()(T logit) const {
    return sigmoid(logit);
  }
};

// OfGrey computes the probability p from a grey level. It is exactly 0 for black and exactly 1 for white.
struct OfGrey {
  int white;

  template <typename T>
  WAKESLEEP_FUNCTION T operator()(T grey) const {
    return grey / T(white);
  }
};

}  // namespace wakesleep
