// One step of the Adam optimizer.
#include <ATen/ops/empty_like.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <limits>

#include "checks.h"
#include "register.h"

namespace wakesleep {
namespace {

constexpr auto kAdam = "adam_";

NumberInTensor number_in(const Argument& argument) {
  const auto type = argument.tensor.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble, kAdam, ": expected ", argument,
                   " to be float64 or float32, got ", type);
  TORCH_CHECK_VALUE(argument.tensor.dim() == 0, kAdam, ": expected ", argument, " to have shape [], got ",
                    argument.tensor.sizes());
  return {read(argument.tensor), type == at::kDouble};
}

void check_number(const char* name, double value, bool is_valid, const char* expected) {
  TORCH_CHECK_VALUE(is_valid, kAdam, ": expected ", name, " to be ", expected, ", got ", value);
}

AdamRule check_rule(const at::Tensor& step, const at::Tensor& lr, double beta1, double beta2, double eps) {
  const AdamRule rule = {number_in({"step", step}), number_in({"lr", lr}), beta1, beta2, eps};
  check_same_device(kAdam, {"step", step}, {"lr", lr});
  check_number("beta1", beta1, 0 <= beta1 && beta1 < 1, "in [0, 1)");
  check_number("beta2", beta2, 0 <= beta2 && beta2 < 1, "in [0, 1)");
  check_number("eps", eps, 0 <= eps && eps < std::numeric_limits<double>::infinity(), "finite and not negative");
  return rule;
}

void check_count(const char* name, at::TensorList tensors, at::TensorList parameters) {
  TORCH_CHECK_VALUE(tensors.size() == parameters.size(), kAdam, ": expected ", name, " to have ", parameters.size(),
                    " tensors, as many as parameters, got ", tensors.size());
}

void check_same_dtype(const Argument& first, const Argument& other) {
  TORCH_CHECK_TYPE(first.tensor.scalar_type() == other.tensor.scalar_type(), kAdam, ": expected ", other, " to be ",
                   first.tensor.scalar_type(), ", the dtype of ", first, ", got ", other.tensor.scalar_type());
}

void check_like(const Argument& parameter, const Argument& other) {
  check_same_device(kAdam, parameter, other);
  check_same_dtype(parameter, other);
  TORCH_CHECK_VALUE(parameter.tensor.sizes() == other.tensor.sizes(), kAdam, ": expected ", other, " to have shape ",
                    parameter.tensor.sizes(), ", that of ", parameter, ", got ", other.tensor.sizes());
}

// Returns true if a and b store their elements in the same order. In that case, both are dense or neither is.
bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  return (a.is_contiguous() && b.is_contiguous()) || a.strides() == b.strides();
}

// The lists of a step, of equal length.
struct AdamLists {
  at::TensorList parameters, gradients, exp_avgs, exp_avg_sqs;
};

void check_tensors(const AdamLists& of, size_t i, const at::Tensor& step) {
  const Argument parameter = {"parameters", of.parameters[i], i};
  check_floating(kAdam, parameter);
  check_same_device(kAdam, {"step", step}, parameter);
  check_same_dtype({"parameters", of.parameters[0], 0}, parameter);
  TORCH_CHECK_VALUE(parameter.tensor.is_non_overlapping_and_dense(), kAdam, ": expected ", parameter,
                    " to be dense, got shape ", parameter.tensor.sizes(), " and strides ", parameter.tensor.strides());
  check_like(parameter, {"gradients", of.gradients[i], i});
  for (const Argument& state : {Argument{"exp_avgs", of.exp_avgs[i], i}, {"exp_avg_sqs", of.exp_avg_sqs[i], i}}) {
    check_like(parameter, state);
    TORCH_CHECK_VALUE(same_layout(state.tensor, parameter.tensor), kAdam, ": expected ", state, " to have strides ",
                      parameter.tensor.strides(), ", those of ", parameter, ", got ", state.tensor.strides());
  }
}

// The memory of a tensor.
struct MemoryRange {
  const char *first, *end;
  Argument of;
  bool is_written;
};

void check_disjoint(const c10::SmallVectorImpl<MemoryRange>& ranges) {
  c10::SmallVector<const MemoryRange*, 64> order;
  for (const MemoryRange& range : ranges) {
    if (range.first != range.end) {
      order.push_back(&range);
    }
  }
  std::sort(order.begin(), order.end(), [](const MemoryRange* a, const MemoryRange* b) { return a->first < b->first; });
  const MemoryRange *furthest = nullptr, *furthest_written = nullptr;  // among the ranges visited so far
  const auto extend = [](const MemoryRange*& furthest, const MemoryRange* range) {
    furthest = furthest == nullptr || range->end > furthest->end ? range : furthest;
  };
  for (const MemoryRange* range : order) {
    const MemoryRange* other = range->is_written ? furthest : furthest_written;
    TORCH_CHECK_VALUE(other == nullptr || range->first >= other->end, kAdam, ": expected ", range->of,
                      " to share no memory with ", other->of, ", but they overlap");
    extend(furthest, range);
    if (range->is_written) {
      extend(furthest_written, range);
    }
  }
}

// Checks that no tensor that the step modifies shares memory with another tensor.
void check_memory(const AdamLists& of) {
  c10::SmallVector<MemoryRange, 64> ranges;
  const auto add = [&](const char* name, const at::Tensor& tensor, size_t i, bool is_written) {
    const auto* first = static_cast<const char*>(tensor.const_data_ptr());
    ranges.push_back({first, first + tensor.nbytes(), {name, tensor, i}, is_written});
  };
  for (size_t i = 0; i < of.parameters.size(); ++i) {
    add("parameters", of.parameters[i], i, true);
    add("exp_avgs", of.exp_avgs[i], i, true);
    add("exp_avg_sqs", of.exp_avg_sqs[i], i, true);
    add("gradients", of.gradients[i], i, false);
  }
  check_disjoint(ranges);
}

void adam_(at::TensorList parameters,    // any shapes
           at::TensorList gradients_in,  // same shapes as parameters
           at::TensorList exp_avgs,      // same shapes as parameters
           at::TensorList exp_avg_sqs,   // same shapes as parameters
           const at::Tensor& step,       // []
           const at::Tensor& lr,         // []
           double beta1, double beta2, double eps) {
  const AdamRule rule = check_rule(step, lr, beta1, beta2, eps);
  check_count("gradients", gradients_in, parameters);
  check_count("exp_avgs", exp_avgs, parameters);
  check_count("exp_avg_sqs", exp_avg_sqs, parameters);
  if (parameters.empty()) {
    return;
  }
  for (size_t i = 0; i < parameters.size(); ++i) {
    check_tensors({parameters, gradients_in, exp_avgs, exp_avg_sqs}, i, step);
  }
  c10::SmallVector<at::Tensor, 16> gradients;
  for (size_t i = 0; i < parameters.size(); ++i) {  // the kernels need one memory layout for all four tensors
    const at::Tensor& gradient = gradients_in[i];
    gradients.push_back(same_layout(gradient, parameters[i]) ? gradient
                                                             : at::empty_like(parameters[i]).copy_(gradient));
  }
  check_memory({parameters, gradients, exp_avgs, exp_avg_sqs});
  c10::SmallVector<AdamTensor, 16> tensors;
  for (size_t i = 0; i < parameters.size(); ++i) {
    tensors.push_back(
        {write(parameters[i]), read(gradients[i]), write(exp_avgs[i]), write(exp_avg_sqs[i]), parameters[i].numel()});
  }
  compute(step.device(), Adam{dtype_of(parameters[0]), tensors.data(), static_cast<int64_t>(tensors.size()), rule});
}

}  // namespace

WAKESLEEP_OPS(m) { m.impl("adam_", adam_); }

}  // namespace wakesleep
