// One step of the Adam optimizer:
//
//   m <- beta1 m + (1 - beta1) g
//   v <- beta2 v + (1 - beta2) g^2
//   p <- p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// Kingma & Ba, "Adam: a method for stochastic optimization" (ICLR 2015), algorithm 1.
//
// Most tensors are too small to keep a device busy, so a step processes all tensors together. Each tensor is divided
// into pieces of a fixed size. The pieces of all tensors are numbered consecutively.
#pragma once

#include <vector>

#include "kernel.h"

namespace wakesleep {

// The constants of a step. They are computed in advance, so that each element needs only one division.
template <typename compute_t>
struct AdamStep {
  compute_t beta1, new1;  // weights of the old mean and the new gradient
  compute_t beta2, new2;
  compute_t rate;   // lr / (1 - beta1^t)
  compute_t scale;  // 1 / sqrt(1 - beta2^t)
  compute_t eps;

  WAKESLEEP_FUNCTION void operator()(compute_t gradient, compute_t& parameter, compute_t& exp_avg,
                                     compute_t& exp_avg_sq) const {
    exp_avg = beta1 * exp_avg + new1 * gradient;
    exp_avg_sq = beta2 * exp_avg_sq + new2 * gradient * gradient;
    parameter -= rate * exp_avg / (std::sqrt(exp_avg_sq) * scale + eps);
  }
};

// A number stored in a tensor, in float64 or float32. read() must run on the tensor's device.
struct NumberInTensor {
  const void* data;
  bool is_double;

  WAKESLEEP_FUNCTION double read() const {
    return is_double ? *static_cast<const double*>(data) : *static_cast<const float*>(data);
  }
};

// The inputs from which AdamStep is computed. The bias corrections are computed in float64, because 1 - beta2^t is only
// about 0.001 in the first step.
struct AdamRule {
  NumberInTensor step, lr;
  double beta1, beta2, eps;

  template <typename compute_t>
  WAKESLEEP_FUNCTION AdamStep<compute_t> read() const {
    const double t = step.read();
    const double rate = lr.read() / (1 - std::pow(beta1, t)), scale = 1 / std::sqrt(1 - std::pow(beta2, t));
    return {compute_t(beta1), compute_t(1 - beta1), compute_t(beta2), compute_t(1 - beta2),
            compute_t(rate),  compute_t(scale),     compute_t(eps)};
  }
};

// A parameter, its gradient and its two moments. All four have the same dtype and the same memory layout.
struct AdamTensor {
  void* parameter;
  const void* gradient;
  void *exp_avg, *exp_avg_sq;
  int64_t size;
};

struct Adam {
  Dtype dtype;                // of all tensors
  const AdamTensor* tensors;  // [count], on the CPU
  int64_t count;              // at least 1
  AdamRule rule;
};

// A tensor with its type, divided into pieces of `elements` elements.
template <typename scalar_t, int64_t elements>
struct AdamPieces {
  scalar_t* parameter;
  const scalar_t* gradient;
  scalar_t* exp_avg;
  scalar_t* exp_avg_sq;
  int64_t size;
  int64_t first;  // number of the tensor's first piece

  WAKESLEEP_FUNCTION int64_t end() const { return first + (size + elements - 1) / elements; }
};

template <typename scalar_t, int64_t elements>
std::vector<AdamPieces<scalar_t, elements>> divide(const Adam& call) {
  std::vector<AdamPieces<scalar_t, elements>> all;
  for (int64_t i = 0; i < call.count; ++i) {
    const AdamTensor& tensor = call.tensors[i];
    all.push_back({static_cast<scalar_t*>(tensor.parameter), static_cast<const scalar_t*>(tensor.gradient),
                   static_cast<scalar_t*>(tensor.exp_avg), static_cast<scalar_t*>(tensor.exp_avg_sq), tensor.size,
                   i == 0 ? 0 : all.back().end()});
  }
  return all;
}

}  // namespace wakesleep

WAKESLEEP_KERNEL(Adam)
