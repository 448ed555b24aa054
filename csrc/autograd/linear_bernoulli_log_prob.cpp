// Gradients of log p(x; h weight^T + bias). In this list, g is the upstream gradient times x - s(logits):
//
//   h: g weight;
//   weight: g^T h;
//   bias: the sum of g over the rows;
//   x: the logits, times the upstream gradient.
//
// When the op returns one log-likelihood per row, the upstream gradients are unknown until the backward pass. The
// logits are either kept until then or recomputed chunk by chunk. When the op returns a sum with given weights, the
// forward pass computes the gradients while each chunk of logits is in cache. The backward pass only multiplies these
// gradients by a scalar.
#include "../ops/kept_logits.h"

#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>

#include "function.h"
#include "weighted_sum.h"

namespace wakesleep::autograd {
namespace {

WAKESLEEP_OPERATOR(linear_bernoulli_log_prob_and_gradients,
                   Quintuple(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, double,
                             bool, bool, bool))

// Returns the gradients of h, weight and bias.
variable_list parameter_gradients(const AutogradContext& context, const Tensor& grad, const Tensor& h,
                                  const Tensor& weight, const Tensor& bias, const Tensor& x,
                                  const OptionalTensor& logits) {
  const bool with_grad_h = context.needs_input_grad(0), with_grad_weight = context.needs_input_grad(1);
  const auto [grad_h, grad_weight, grad_bias] =
      linear_bernoulli_log_prob_backward().call(grad, h, weight, bias, x, logits, with_grad_h, with_grad_weight);
  return {with_grad_h ? sum_like(grad_h, h) : Tensor(), with_grad_weight ? grad_weight : Tensor(), grad_bias};
}

// Returns the gradient of x: the logits times the upstream gradient, summed over the rows that share an x. The logits
// are linear in h, so the code sums h over these rows first, and then computes fewer logits.
Tensor grad_x(const Tensor& grad, const Tensor& h, const Tensor& weight, const Tensor& bias, const Tensor& x) {
  const auto type = grad.scalar_type();
  c10::SymDimVector batch(x.sym_sizes().begin(), x.sym_sizes().end() - 1), shape = batch;
  shape.push_back(h.sym_size(-1));
  const Tensor grad_h = at::sum_to(grad.unsqueeze(-1) * h.to(type), shape);
  return at::linear(grad_h, weight.to(type)) + at::sum_to(grad, batch).unsqueeze(-1) * bias.to(type);
}

struct LinearBernoulliLogProb : Function<LinearBernoulliLogProb> {
  static constexpr auto name = "linear_bernoulli_log_prob";

  static Tensor forward(AutogradContext* context, const Tensor& h, const Tensor& weight, const Tensor& bias,
                        const Tensor& x, std::optional<bool> recompute) {
    const int64_t kept = recompute ? (*recompute ? kKeepNone : kKeepAll) : kept_bytes(h.device());
    const auto [log_prob, logits] = below(linear_bernoulli_log_prob_and_logits(), h, weight, bias, x, kept);
    context->save_for_backward({h, weight, bias, x, logits});
    return log_prob;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &h = saved[0], &weight = saved[1], &bias = saved[2], &x = saved[3], &logits = saved[4];
    variable_list result(3);
    if (context->needs_input_grad(0) || context->needs_input_grad(1) || context->needs_input_grad(2)) {
      result = parameter_gradients(*context, grads[0], h, weight, bias, x, logits);
    }
    result.push_back(context->needs_input_grad(3) ? grad_x(grads[0], h, weight, bias, x) : Tensor());
    result.emplace_back();
    return result;
  }
};

Tensor linear_bernoulli_log_prob_of(const Tensor& h, const Tensor& weight, const Tensor& bias, const Tensor& x,
                                    std::optional<bool> recompute) {
  if (!needs_gradient(h, weight, bias, x)) {
    return below(linear_bernoulli_log_prob(), h, weight, bias, x, recompute);
  }
  if (is_transformed(h, weight, bias, x)) {  // the formula below would compute the logits again
    const auto type = compute_dtype(promoted(h, weight, bias));
    return bernoulli_log_prob().call(
        mlp().call(h.to(type), {weight.to(type)}, {bias.to(type)}, std::nullopt, std::nullopt), x);
  }
  return LinearBernoulliLogProb::apply(h, weight, bias, x, recompute);
}

// Double backward: autograd differentiates this formula instead of the kernel.
Triple linear_bernoulli_log_prob_backward_of(const Tensor& grad, const Tensor& h, const Tensor& weight,
                                             const Tensor& bias, const Tensor& x, const OptionalTensor& logits,
                                             bool with_grad_h, bool with_grad_weight) {
  if (!needs_gradient(grad, h, weight, bias, x)) {
    return below(linear_bernoulli_log_prob_backward(), grad, h, weight, bias, x, logits, with_grad_h, with_grad_weight);
  }
  const auto type = grad.scalar_type();
  const Tensor wide_h = h.to(type), wide_weight = weight.to(type);
  const Tensor probability = at::linear(wide_h, wide_weight, bias.to(type)).sigmoid();
  const Tensor grad_logits = grad.unsqueeze(-1) * (x.to(type) - probability);
  const auto rows = [](const Tensor& tensor) { return tensor.reshape_symint({-1, tensor.sym_size(-1)}); };
  auto shape = grad_logits.sym_sizes().vec();
  shape.back() = h.sym_size(-1);
  const Tensor none = at::zeros_symint({0, shape.back()}, grad.options());
  return {with_grad_h ? at::matmul(grad_logits, wide_weight) : none,
          with_grad_weight ? at::mm(rows(grad_logits).t(), rows(wide_h.expand_symint(shape))) : none,
          rows(grad_logits).sum(0)};
}

struct LinearBernoulliLogProbSum : Function<LinearBernoulliLogProbSum> {
  static constexpr auto name = "linear_bernoulli_log_prob_sum";

  static Tensor forward(AutogradContext* context, const Tensor& h, const Tensor& weight, const Tensor& bias,
                        const Tensor& x, const OptionalTensor& sample_weight, double scale) {
    const bool with_log_prob = sample_weight && sample_weight->requires_grad();
    const auto [sum, log_prob, grad_h, grad_weight, grad_bias] =
        below(linear_bernoulli_log_prob_and_gradients(), h, weight, bias, x, sample_weight, scale, h.requires_grad(),
              weight.requires_grad(), with_log_prob);
    context->save_for_backward({h, weight, bias, x, sample_weight.value_or(Tensor()), log_prob});
    context->saved_data["scale"] = scale;
    context->saved_data["formed"] =
        variable_list{h.requires_grad() ? sum_like(grad_h, h) : grad_h, grad_weight, grad_bias};
    return sum;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &h = saved[0], &weight = saved[1], &bias = saved[2], &x = saved[3], &sample_weight = saved[4];
    const Tensor &log_prob = saved[5], &grad = grads[0];
    const double scale = context->saved_data["scale"].toDouble();
    const auto grad_log_prob = [&] {
      const auto batch_of = [](const Tensor& tensor) { return tensor.sym_sizes().slice(0, tensor.dim() - 1); };
      const auto batch = at::infer_size_symdimvector(batch_of(h), batch_of(x));
      return gradient_of_rows(grad, sample_weight, scale, batch);
    };
    const bool differentiable = at::GradMode::is_enabled();  // if create_graph=True
    variable_list result = differentiable
                               ? parameter_gradients(*context, grad_log_prob(), h, weight, bias, x, std::nullopt)
                               : times(context->saved_data["formed"], grad);
    result.push_back(context->needs_input_grad(3) ? grad_x(grad_log_prob(), h, weight, bias, x) : Tensor());
    result.emplace_back();
    if (sample_weight.defined() && context->needs_input_grad(4)) {
      const Tensor value = differentiable ? linear_bernoulli_log_prob().call(h, weight, bias, x, true) : log_prob;
      result.back() = gradient_of_weight(grad, value, scale, sample_weight);
    }
    result.emplace_back();
    return result;
  }
};

Tensor linear_bernoulli_log_prob_sum_of(const Tensor& h, const Tensor& weight, const Tensor& bias, const Tensor& x,
                                        const OptionalTensor& sample_weight, double scale) {
  return needs_gradient(h, weight, bias) && !is_transformed(h, weight, bias)
             ? LinearBernoulliLogProbSum::apply(h, weight, bias, x, sample_weight, scale)
             : weighted_sum("linear_bernoulli_log_prob_sum",
                            linear_bernoulli_log_prob().call(h, weight, bias, x, std::nullopt), sample_weight, scale);
}

}  // namespace

TORCH_LIBRARY_IMPL(wakesleep_ext, Autograd, m) {
  m.impl("linear_bernoulli_log_prob", linear_bernoulli_log_prob_of);
  m.impl("linear_bernoulli_log_prob_backward", linear_bernoulli_log_prob_backward_of);
}

WAKESLEEP_COMPOSITE(linear_bernoulli_log_prob_sum, linear_bernoulli_log_prob_sum_of)

}  // namespace wakesleep::autograd
