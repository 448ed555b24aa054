// log N(z; mu, diag e^logvar) = -1/2 sum_k [logvar + t^2 + log 2 pi], t = (z - mu) e^(-logvar/2), and its gradients.
#pragma once

#include "kernel.h"

namespace wakesleep {

struct GaussianLogProb {
  Dtype dtype;  // of mu, logvar and z
  const void *mu, *logvar, *z;
  void* log_prob;  // [rows], in the compute type
  RowMap<3> rows;  // operands: mu, logvar, z
  int64_t K;
};

struct GaussianLogProbBackward {
  Dtype dtype;  // of mu, logvar and z
  const void *mu, *logvar, *z;
  const void* grad;         // in the compute type
  GradientRows parameters;  // [outer rows, 2K]: [grad_mu | grad_logvar]
  void* grad_z;             // null if not needed
  RowGroups<5> rows;        // operands: mu, logvar, z, grad, grad_z; outer rows: the rows of mu and logvar
  int64_t K;
};

}  // namespace wakesleep

WAKESLEEP_KERNEL(GaussianLogProb)
WAKESLEEP_KERNEL(GaussianLogProbBackward)
