// Gradients of kl = KL(N(mu, e^logvar) || N(0, I)): dkl/dmu = mu and dkl/dlogvar = (e^logvar - 1) / 2.
#include "function.h"

namespace wakesleep::autograd {
namespace {

WAKESLEEP_OPERATOR(gaussian_kl, Tensor(const Tensor&, const Tensor&))
WAKESLEEP_OPERATOR(gaussian_kl_backward, Tensor(const Tensor&, const Tensor&, const Tensor&))

struct GaussianKl : Function<GaussianKl> {
  static constexpr auto name = "gaussian_kl";

  static Tensor forward(AutogradContext* context, const Tensor& mu, const Tensor& logvar) {
    context->save_for_backward({mu, logvar});
    return below(gaussian_kl(), mu, logvar);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const auto [grad_mu, grad_logvar] = halves(gaussian_kl_backward().call(grads[0], saved[0], saved[1]));
    return {sum_like(grad_mu, saved[0]), sum_like(grad_logvar, saved[1])};
  }
};

Tensor gaussian_kl_of(const Tensor& mu, const Tensor& logvar) {
  return needs_gradient(mu, logvar) ? GaussianKl::apply(mu, logvar) : below(gaussian_kl(), mu, logvar);
}

// Double backward: autograd differentiates this formula instead of the kernel.
Tensor gaussian_kl_backward_of(const Tensor& grad, const Tensor& mu, const Tensor& logvar) {
  if (!needs_gradient(grad, mu, logvar)) {
    return below(gaussian_kl_backward(), grad, mu, logvar);
  }
  const auto shape = at::infer_size_symdimvector(mu.sym_sizes(), logvar.sym_sizes());
  const Tensor upstream = grad.unsqueeze(-1);
  return at::cat({(upstream * mu).expand_symint(shape), (0.5 * upstream * (logvar.exp() - 1)).expand_symint(shape)},
                 -1);
}

}  // namespace

TORCH_LIBRARY_IMPL(wakesleep_ext, Autograd, m) {
  m.impl("gaussian_kl", gaussian_kl_of);
  m.impl("gaussian_kl_backward", gaussian_kl_backward_of);
}

}  // namespace wakesleep::autograd
