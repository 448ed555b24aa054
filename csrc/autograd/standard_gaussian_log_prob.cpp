// Gradient of log N(z; 0, I): -z.
#include "function.h"

namespace wakesleep::autograd {
namespace {

WAKESLEEP_OPERATOR(standard_gaussian_log_prob, Tensor(const Tensor&))
WAKESLEEP_OPERATOR(standard_gaussian_log_prob_backward, Tensor(const Tensor&, const Tensor&))

struct StandardGaussianLogProb : Function<StandardGaussianLogProb> {
  static constexpr auto name = "standard_gaussian_log_prob";

  static Tensor forward(AutogradContext* context, const Tensor& z) {
    context->save_for_backward({z});
    return below(standard_gaussian_log_prob(), z);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    return {standard_gaussian_log_prob_backward().call(grads[0], context->get_saved_variables()[0])};
  }
};

Tensor standard_gaussian_log_prob_of(const Tensor& z) {
  return needs_gradient(z) ? StandardGaussianLogProb::apply(z) : below(standard_gaussian_log_prob(), z);
}

// Double backward: autograd differentiates this formula instead of the kernel.
Tensor standard_gaussian_log_prob_backward_of(const Tensor& grad, const Tensor& z) {
  return needs_gradient(grad, z) ? (-grad.unsqueeze(-1) * z).to(z.scalar_type())
                                 : below(standard_gaussian_log_prob_backward(), grad, z);
}

}  // namespace

TORCH_LIBRARY_IMPL(wakesleep_ext, Autograd, m) {
  m.impl("standard_gaussian_log_prob", standard_gaussian_log_prob_of);
  m.impl("standard_gaussian_log_prob_backward", standard_gaussian_log_prob_backward_of);
}

}  // namespace wakesleep::autograd
