// Gradients of L = log p(x; a), where a are the logits and s is the sigmoid: dL/da = x - s(a) and dL/dx = a.
#include "function.h"

namespace wakesleep::autograd {
namespace {

struct BernoulliLogProb : Function<BernoulliLogProb> {
  static constexpr auto name = "bernoulli_log_prob";

  static Tensor forward(AutogradContext* context, const Tensor& logits, const Tensor& x) {
    context->save_for_backward({logits, x});
    return below(bernoulli_log_prob(), logits, x);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &logits = saved[0], &x = saved[1];
    variable_list result(2);
    if (context->needs_input_grad(0)) {
      result[0] = bernoulli_log_prob_backward().call(grads[0], logits, x);
    }
    if (context->needs_input_grad(1)) {
      result[1] = sum_like(grads[0].unsqueeze(-1) * logits, x);
    }
    return result;
  }
};

Tensor bernoulli_log_prob_of(const Tensor& logits, const Tensor& x) {
  return needs_gradient(logits, x) ? BernoulliLogProb::apply(logits, x) : below(bernoulli_log_prob(), logits, x);
}

// Double backward: autograd differentiates this formula instead of the kernel.
Tensor bernoulli_log_prob_backward_of(const Tensor& grad, const Tensor& logits, const Tensor& x) {
  if (!needs_gradient(grad, logits, x)) {
    return below(bernoulli_log_prob_backward(), grad, logits, x);
  }
  const Tensor grad_logits = grad.unsqueeze(-1) * (x.to(grad.scalar_type()) - logits.to(grad.scalar_type()).sigmoid());
  return sum_like(grad_logits, logits).to(logits.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(wakesleep_ext, Autograd, m) {
  m.impl("bernoulli_log_prob", bernoulli_log_prob_of);
  m.impl("bernoulli_log_prob_backward", bernoulli_log_prob_backward_of);
}

}  // namespace wakesleep::autograd
