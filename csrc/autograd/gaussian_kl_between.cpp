// Gradients of kl = KL(N(mu, e^logvar) || N(prior_mu, e^prior_logvar)), with g = (mu - prior_mu) e^-prior_logvar and
// r = e^(logvar - prior_logvar): dkl/dmu = g = -dkl/dprior_mu, dkl/dlogvar = (r - 1) / 2 and
// dkl/dprior_logvar = -(r - 1 + (mu - prior_mu) g) / 2.
#include "function.h"

namespace wakesleep::autograd {
namespace {

WAKESLEEP_OPERATOR(gaussian_kl_between, Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&))
WAKESLEEP_OPERATOR(gaussian_kl_between_backward,
                   Pair(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool, bool))

struct GaussianKlBetween : Function<GaussianKlBetween> {
  static constexpr auto name = "gaussian_kl_between";

  static Tensor forward(AutogradContext* context, const Tensor& mu, const Tensor& logvar, const Tensor& prior_mu,
                        const Tensor& prior_logvar) {
    context->save_for_backward({mu, logvar, prior_mu, prior_logvar});
    return below(gaussian_kl_between(), mu, logvar, prior_mu, prior_logvar);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const auto needs = [&](size_t index) { return context->needs_input_grad(index); };
    const auto [packed, packed_prior] = gaussian_kl_between_backward().call(
        grads[0], saved[0], saved[1], saved[2], saved[3], needs(0) || needs(1), needs(2) || needs(3));
    const auto [grad_mu, grad_logvar] = halves(packed);
    const auto [grad_prior_mu, grad_prior_logvar] = halves(packed_prior);
    variable_list found = {grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar};
    for (size_t i = 0; i < found.size(); ++i) {
      found[i] = needs(i) ? sum_like(found[i], saved[i]) : Tensor();
    }
    return found;
  }
};

Tensor gaussian_kl_between_of(const Tensor& mu, const Tensor& logvar, const Tensor& prior_mu,
                              const Tensor& prior_logvar) {
  return needs_gradient(mu, logvar, prior_mu, prior_logvar)
             ? GaussianKlBetween::apply(mu, logvar, prior_mu, prior_logvar)
             : below(gaussian_kl_between(), mu, logvar, prior_mu, prior_logvar);
}

// Double backward: autograd differentiates this formula instead of the kernel.
Pair gaussian_kl_between_backward_of(const Tensor& grad, const Tensor& mu, const Tensor& logvar, const Tensor& prior_mu,
                                     const Tensor& prior_logvar, bool with_grad, bool with_grad_prior) {
  if (!needs_gradient(grad, mu, logvar, prior_mu, prior_logvar)) {
    return below(gaussian_kl_between_backward(), grad, mu, logvar, prior_mu, prior_logvar, with_grad, with_grad_prior);
  }
  const auto shape = at::infer_size_symdimvector(prior_mu.sym_sizes(), prior_logvar.sym_sizes());
  const Tensor upstream = grad.unsqueeze(-1), difference = mu - prior_mu;
  const Tensor scaled = difference * (-prior_logvar).exp(), excess = (logvar - prior_logvar).exp() - 1;
  const Tensor grad_mu = upstream * scaled, grad_logvar = 0.5 * upstream * excess;
  const Tensor grad_prior_logvar = -0.5 * upstream * (excess + difference * scaled);
  return {at::cat({grad_mu, grad_logvar}, -1),
          at::cat({at::sum_to(-grad_mu, shape), at::sum_to(grad_prior_logvar, shape)}, -1)};
}

}  // namespace

TORCH_LIBRARY_IMPL(wakesleep_ext, Autograd, m) {
  m.impl("gaussian_kl_between", gaussian_kl_between_of);
  m.impl("gaussian_kl_between_backward", gaussian_kl_between_backward_of);
}

}  // namespace wakesleep::autograd
