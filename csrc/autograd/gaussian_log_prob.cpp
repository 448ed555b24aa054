// Gradients of L = log N(z; mu, e^logvar), with g = (z - mu) e^-logvar:
// dL/dmu = g, dL/dlogvar = ((z - mu) g - 1) / 2 and dL/dz = -g.
#include "operators.h"

namespace wakesleep::autograd {
namespace {

WAKESLEEP_OPERATOR(gaussian_log_prob, Tensor(const Tensor&, const Tensor&, const Tensor&))
WAKESLEEP_OPERATOR(gaussian_log_prob_backward, Pair(const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool))

struct GaussianLogProb : torch::autograd::Function<GaussianLogProb> {
  static Tensor forward(AutogradContext* context, const Tensor& mu, const Tensor& logvar, const Tensor& z) {
    context->save_for_backward({mu, logvar, z});
    return below(gaussian_log_prob(), mu, logvar, z);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const bool with_grad_z = context->needs_input_grad(2);
    const auto [grad_parameters, grad_z] =
        gaussian_log_prob_backward().call(grads[0], saved[0], saved[1], saved[2], with_grad_z);
    const auto [grad_mu, grad_logvar] = halves(grad_parameters);
    return {sum_like(grad_mu, saved[0]), sum_like(grad_logvar, saved[1]),
            with_grad_z ? sum_like(grad_z, saved[2]) : Tensor()};
  }
};

Tensor gaussian_log_prob_of(const Tensor& mu, const Tensor& logvar, const Tensor& z) {
  return needs_gradient(mu, logvar, z) ? GaussianLogProb::apply(mu, logvar, z)
                                       : below(gaussian_log_prob(), mu, logvar, z);
}

// Double backward: autograd differentiates this formula instead of the kernel.
Pair gaussian_log_prob_backward_of(const Tensor& grad, const Tensor& mu, const Tensor& logvar, const Tensor& z,
                                   bool with_grad_z) {
  if (!needs_gradient(grad, mu, logvar, z)) {
    return below(gaussian_log_prob_backward(), grad, mu, logvar, z, with_grad_z);
  }
  const auto shape = at::infer_size_symdimvector(mu.sym_sizes(), logvar.sym_sizes());
  const Tensor upstream = grad.unsqueeze(-1), difference = z - mu, scaled = difference * (-logvar).exp();
  const Tensor grad_mu = upstream * scaled, grad_logvar = 0.5 * upstream * (difference * scaled - 1);
  return {at::cat({at::sum_to(grad_mu, shape), at::sum_to(grad_logvar, shape)}, -1), -grad_mu};
}

}  // namespace

TORCH_LIBRARY_IMPL(wakesleep_ext, Autograd, m) {
  m.impl("gaussian_log_prob", gaussian_log_prob_of);
  m.impl("gaussian_log_prob_backward", gaussian_log_prob_backward_of);
}

}  // namespace wakesleep::autograd
