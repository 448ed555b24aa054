// One step of the Adam optimizer: the checked operands of a call, and the update of one element.
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

#include <c10/util/SmallVector.h>

#include <algorithm>
#include <limits>

#include "aten.h"
#include "checks.h"
#include "dispatch.h"
#include "elementary.h"

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

// A number stored in a tensor. read() must run on the tensor's device.
struct NumberInTensor {
  const void* data;
  bool is_double;

  explicit NumberInTensor(const at::Tensor& tensor)
      : data(tensor.const_data_ptr()), is_double(tensor.scalar_type() == at::kDouble) {}

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

// A parameter, its gradient and its two moments, divided into pieces of `elements` elements.
template <typename scalar_t, int64_t elements>
struct AdamTensor {
  scalar_t* parameter;
  const scalar_t* gradient;
  scalar_t* exp_avg;
  scalar_t* exp_avg_sq;
  int64_t size;
  int64_t first;  // number of the tensor's first piece

  WAKESLEEP_FUNCTION int64_t end() const { return first + (size + elements - 1) / elements; }
};

struct Adam {
  static constexpr auto op = "adam_";
  at::TensorList parameters, exp_avgs, exp_avg_sqs;
  c10::SmallVector<at::Tensor, 16> gradients;
  AdamRule rule;

  Adam(at::TensorList parameters_in, at::TensorList gradients_in, at::TensorList exp_avgs_in,
       at::TensorList exp_avg_sqs_in, const at::Tensor& step, const at::Tensor& lr, double beta1, double beta2,
       double eps)
      : parameters(parameters_in),
        exp_avgs(exp_avgs_in),
        exp_avg_sqs(exp_avg_sqs_in),
        rule{number({"step", step}), number({"lr", lr}), beta1, beta2, eps} {
    check_same_device(op, {"step", step}, {"lr", lr});
    check_number("beta1", beta1, 0 <= beta1 && beta1 < 1, "in [0, 1)");
    check_number("beta2", beta2, 0 <= beta2 && beta2 < 1, "in [0, 1)");
    check_number("eps", eps, 0 <= eps && eps < std::numeric_limits<double>::infinity(), "finite and not negative");
    check_count("gradients", gradients_in);
    check_count("exp_avgs", exp_avgs);
    check_count("exp_avg_sqs", exp_avg_sqs);
    for (size_t i = 0; i < parameters.size(); ++i) {
      const Argument parameter = {"parameters", parameters[i], i};
      check_floating(op, parameter);
      check_same_device(op, {"step", step}, parameter);
      check_same_dtype({"parameters", parameters[0], 0}, parameter);
      TORCH_CHECK_VALUE(parameter.tensor.is_non_overlapping_and_dense(), op, ": expected ", parameter,
                        " to be dense, got shape ", parameter.tensor.sizes(), " and strides ",
                        parameter.tensor.strides());
      check_like(parameter, {"gradients", gradients_in[i], i});
      for (const Argument& state : {Argument{"exp_avgs", exp_avgs[i], i}, {"exp_avg_sqs", exp_avg_sqs[i], i}}) {
        check_like(parameter, state);
        TORCH_CHECK_VALUE(same_layout(state.tensor, parameter.tensor), op, ": expected ", state, " to have strides ",
                          parameter.tensor.strides(), ", those of ", parameter, ", got ", state.tensor.strides());
      }
    }
    for (size_t i = 0; i < parameters.size(); ++i) {  // the kernels need one memory layout for all four tensors
      const at::Tensor& gradient = gradients_in[i];
      gradients.push_back(same_layout(gradient, parameters[i]) ? gradient
                                                               : aten::empty_like(parameters[i]).copy_(gradient));
    }
    check_memory();
  }

  template <typename scalar_t, int64_t elements>
  std::vector<AdamTensor<scalar_t, elements>> tensors() const {
    std::vector<AdamTensor<scalar_t, elements>> all;
    for (size_t i = 0; i < parameters.size(); ++i) {
      all.push_back({parameters[i].mutable_data_ptr<scalar_t>(), gradients[i].const_data_ptr<scalar_t>(),
                     exp_avgs[i].mutable_data_ptr<scalar_t>(), exp_avg_sqs[i].mutable_data_ptr<scalar_t>(),
                     parameters[i].numel(), i == 0 ? 0 : all.back().end()});
    }
    return all;
  }

  // Calls body(Type<scalar_t>{}) if there is at least one parameter.
  template <typename Body>
  void dispatch(const Body& body) const {
    if (!parameters.empty()) {
      dispatch_floating(op, parameters[0].scalar_type(), body);
    }
  }

 private:
  static NumberInTensor number(const Argument& argument) {
    const auto type = argument.tensor.scalar_type();
    TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble, op, ": expected ", argument,
                     " to be float64 or float32, got ", type);
    TORCH_CHECK_VALUE(argument.tensor.dim() == 0, op, ": expected ", argument, " to have shape [], got ",
                      argument.tensor.sizes());
    return NumberInTensor(argument.tensor);
  }

  static void check_number(const char* name, double value, bool is_valid, const char* expected) {
    TORCH_CHECK_VALUE(is_valid, op, ": expected ", name, " to be ", expected, ", got ", value);
  }

  // Checks that no tensor that the step modifies shares memory with another tensor.
  void check_memory() const {
    struct Range {
      const char *first, *end;
      Argument of;
      bool is_written;
    };
    c10::SmallVector<Range, 64> ranges;
    const auto add = [&](const char* name, const at::Tensor& tensor, size_t i, bool is_written) {
      const auto* first = static_cast<const char*>(tensor.const_data_ptr());
      ranges.push_back({first, first + tensor.nbytes(), {name, tensor, i}, is_written});
    };
    for (size_t i = 0; i < parameters.size(); ++i) {
      add("parameters", parameters[i], i, true);
      add("exp_avgs", exp_avgs[i], i, true);
      add("exp_avg_sqs", exp_avg_sqs[i], i, true);
      add("gradients", gradients[i], i, false);
    }
    c10::SmallVector<const Range*, 64> order;
    for (const Range& range : ranges) {
      if (range.first != range.end) {
        order.push_back(&range);
      }
    }
    std::sort(order.begin(), order.end(), [](const Range* a, const Range* b) { return a->first < b->first; });
    const Range *furthest = nullptr, *furthest_written = nullptr;  // among the ranges visited so far
    const auto extend = [](const Range*& furthest, const Range* range) {
      furthest = furthest == nullptr || range->end > furthest->end ? range : furthest;
    };
    for (const Range* range : order) {
      const Range* other = range->is_written ? furthest : furthest_written;
      TORCH_CHECK_VALUE(other == nullptr || range->first >= other->end, op, ": expected ", range->of,
                        " to share no memory with ", other->of, ", but they overlap");
      extend(furthest, range);
      if (range->is_written) {
        extend(furthest_written, range);
      }
    }
  }

  // Returns true if a and b store their elements in the same order. In that case, both are dense or neither is.
  static bool same_layout(const at::Tensor& a, const at::Tensor& b) {
    return (a.is_contiguous() && b.is_contiguous()) || a.strides() == b.strides();
  }

  void check_count(const char* name, at::TensorList tensors) const {
    TORCH_CHECK_VALUE(tensors.size() == parameters.size(), op, ": expected ", name, " to have ", parameters.size(),
                      " tensors, as many as parameters, got ", tensors.size());
  }

  static void check_same_dtype(const Argument& first, const Argument& other) {
    TORCH_CHECK_TYPE(first.tensor.scalar_type() == other.tensor.scalar_type(), op, ": expected ", other, " to be ",
                     first.tensor.scalar_type(), ", the dtype of ", first, ", got ", other.tensor.scalar_type());
  }

  static void check_like(const Argument& parameter, const Argument& other) {
    check_same_device(op, parameter, other);
    check_same_dtype(parameter, other);
    TORCH_CHECK_VALUE(parameter.tensor.sizes() == other.tensor.sizes(), op, ": expected ", other, " to have shape ",
                      parameter.tensor.sizes(), ", that of ", parameter, ", got ", other.tensor.sizes());
  }
};

}  // namespace wakesleep
