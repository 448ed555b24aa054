// z = mu + sigma eps with sigma = e^(logvar/2), log q(z) = -1/2 sum_k [logvar + eps^2 + log 2 pi], and the gradients of
// both. eps is a function of the key and the element's index in z, so the backward pass recomputes the same eps.
#pragma once

#include "kernel.h"

namespace wakesleep {

struct GaussianRsample {
  Dtype dtype;  // of mu and logvar
  const void *mu, *logvar;
  const int64_t* key;  // [2]
  void* z;             // [samples, rows, K]
  void* log_prob;      // [samples, rows], in the compute type; null if not needed
  RowMap<2> rows;      // operands: mu, logvar; the rows of one sample
  int64_t samples, K;
};

// grad_mu = sum_s grad_z and grad_logvar = 1/2 sum_s (grad_z sigma eps - grad_log_prob).
struct GaussianRsampleBackward {
  Dtype dtype;                // of logvar
  const void* grad_z;         // [samples, rows, K], or null
  const void* grad_log_prob;  // [samples, rows], in the compute type, or null
  const void* logvar;
  const int64_t* key;       // [2]
  GradientRows parameters;  // [rows, 2K]: [grad_mu | grad_logvar], summed over samples
  RowMap<1> rows;           // operand: logvar; the rows of one sample
  int64_t samples, K;
};

}  // namespace wakesleep

WAKESLEEP_KERNEL(GaussianRsample)
WAKESLEEP_KERNEL(GaussianRsampleBackward)
