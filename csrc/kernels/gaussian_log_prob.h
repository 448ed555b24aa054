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

// The gradients of sum_n w_n log_prob_n with w_n = scale upstream_n, and this sum, in parts. Each part is the sum over
// `pieces_of_part` pieces of rows (see RowGroups). The caller adds the parts.
struct GaussianLogProbAndGradients {
  Dtype dtype;  // of mu, logvar and z
  const void *mu, *logvar, *z;
  const void* upstream;  // in the compute type; null if every element is 1
  double scale;
  GradientRows parameters;  // [outer rows, 2K]: [grad_mu | grad_logvar]
  void* grad_z;             // null if not needed
  void* sums;               // [parts()], in the compute type
  RowGroups<5> rows;        // operands: mu, logvar, z, upstream, grad_z; outer rows: the rows of mu and logvar
  int64_t K;

  int64_t pieces() const { return inner_pieces(rows.inner.rows) * rows.outer.rows; }
  // The length of a part depends only on the shapes, so the sum does not depend on threads and grid.
  int64_t pieces_of_part() const {
    constexpr int64_t kElements = 8192;
    const int64_t rows_of_piece = rows.inner.rows < kPieceRows ? rows.inner.rows : kPieceRows;
    const int64_t elements = rows_of_piece * K;
    return elements < 1 ? kElements : elements < kElements ? kElements / elements : 1;
  }
  int64_t parts() const { return (pieces() + pieces_of_part() - 1) / pieces_of_part(); }
};

}  // namespace wakesleep

WAKESLEEP_KERNEL(GaussianLogProb)
WAKESLEEP_KERNEL(GaussianLogProbBackward)
WAKESLEEP_KERNEL(GaussianLogProbAndGradients)
