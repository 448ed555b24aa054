// KL(N(mu, diag e^logvar) || N(0, I)) = 1/2 sum_k [mu^2 + e^logvar - 1 - logvar] and its gradients.
#pragma once

#include "kernel.h"

namespace wakesleep {

struct GaussianKl {
  Dtype dtype;  // of mu and logvar
  const void *mu, *logvar;
  void* kl;        // [rows], in the compute type
  RowMap<2> rows;  // operands: mu, logvar
  int64_t K;
};

struct GaussianKlBackward {
  Dtype dtype;  // of mu and logvar
  const void *mu, *logvar;
  const void* grad;       // in the compute type
  void* grad_parameters;  // [rows, 2K]: [grad_mu | grad_logvar]
  RowMap<3> rows;         // operands: mu, logvar, grad
  int64_t K;
};

}  // namespace wakesleep

WAKESLEEP_KERNEL(GaussianKl)
WAKESLEEP_KERNEL(GaussianKlBackward)
