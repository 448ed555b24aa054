// KL(N(mu, diag e^logvar) || N(prior_mu, diag e^prior_logvar)) = 1/2 sum_k [t^2 + e^d - 1 - d], where
// t = (mu - prior_mu) e^(-prior_logvar/2) and d = logvar - prior_logvar, and its gradients.
#pragma once

#include "kernel.h"

namespace wakesleep {

struct GaussianKlBetween {
  Dtype dtype;  // of all parameters
  const void *mu, *logvar, *prior_mu, *prior_logvar;
  void* kl;        // [rows], in the compute type
  RowMap<4> rows;  // operands: mu, logvar, prior_mu, prior_logvar
  int64_t K;
};

struct GaussianKlBetweenBackward {
  Dtype dtype;  // of all parameters
  const void *mu, *logvar, *prior_mu, *prior_logvar;
  const void* grad;         // in the compute type
  void* grad_parameters;    // [grad_mu | grad_logvar] for every row; null if not needed
  GradientRows grad_prior;  // [outer rows, 2K]: [grad_prior_mu | grad_prior_logvar]; null if not needed
  // operands: mu, logvar, prior_mu, prior_logvar, grad, grad_parameters; outer rows: the rows of the prior
  RowGroups<6> rows;
  int64_t K;
};

}  // namespace wakesleep

WAKESLEEP_KERNEL(GaussianKlBetween)
WAKESLEEP_KERNEL(GaussianKlBetweenBackward)
