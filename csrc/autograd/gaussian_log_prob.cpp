// Gradients of L = log N(z; mu, e^logvar), with g = (z - mu) e^-logvar:
// dL/dmu = g, dL/dlogvar = ((z - mu) g - 1) / 2 and dL/dz = -g. When the op returns a sum with given weights, the
// forward pass computes the gradients.
#include "function.h"
#include "weighted_sum.h"

namespace wakesleep::autograd {
namespace {

WAKESLEEP_OPERATOR(gaussian_log_prob, Tensor(const Tensor&, const Tensor&, const Tensor&))
WAKESLEEP_OPERATOR(gaussian_log_prob_backward, Pair(const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool))

struct GaussianLogProb : Function<GaussianLogProb> {
  static constexpr auto name = "gaussian_log_prob";

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

WAKESLEEP_OPERATOR(gaussian_log_prob_and_gradients,
                   Quadruple(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, double, bool, bool))

struct GaussianLogProbSum : Function<GaussianLogProbSum> {
  static constexpr auto name = "gaussian_log_prob_sum";

  static Tensor forward(AutogradContext* context, const Tensor& mu, const Tensor& logvar, const Tensor& z,
                        const OptionalTensor& sample_weight, double scale) {
    const bool with_log_prob = sample_weight && sample_weight->requires_grad();
    const auto [sum, log_prob, grad_parameters, grad_z] =
        below(gaussian_log_prob_and_gradients(), mu, logvar, z, sample_weight, scale, z.requires_grad(), with_log_prob);
    context->save_for_backward({mu, logvar, z, sample_weight.value_or(Tensor()), log_prob});
    context->saved_data["scale"] = scale;
    context->saved_data["formed"] = variable_list{grad_parameters, grad_z};
    return sum;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &mu = saved[0], &logvar = saved[1], &z = saved[2], &sample_weight = saved[3], &log_prob = saved[4];
    const Tensor& grad = grads[0];
    const double scale = context->saved_data["scale"].toDouble();
    const bool with_grad_z = context->needs_input_grad(2);
    const bool differentiable = at::GradMode::is_enabled();  // if create_graph=True
    variable_list found;
    if (differentiable) {
      auto shape = at::infer_size_symdimvector(mu.sym_sizes(), logvar.sym_sizes());
      shape = at::infer_size_symdimvector(shape, z.sym_sizes());
      shape.pop_back();
      const auto [grad_parameters, grad_z] = gaussian_log_prob_backward().call(
          gradient_of_rows(grad, sample_weight, scale, shape), mu, logvar, z, with_grad_z);
      found = {grad_parameters, grad_z};
    } else {
      found = times(context->saved_data["formed"], grad);
    }
    const auto [grad_mu, grad_logvar] = halves(found[0]);
    Tensor of_weight;
    if (sample_weight.defined() && context->needs_input_grad(3)) {
      const Tensor value = differentiable ? gaussian_log_prob().call(mu, logvar, z) : log_prob;
      of_weight = gradient_of_weight(grad, value, scale, sample_weight);
    }
    return {sum_like(grad_mu, mu), sum_like(grad_logvar, logvar), with_grad_z ? sum_like(found[1], z) : Tensor(),
            of_weight, Tensor()};
  }
};

Tensor gaussian_log_prob_sum_of(const Tensor& mu, const Tensor& logvar, const Tensor& z,
                                const OptionalTensor& sample_weight, double scale) {
  return needs_gradient(mu, logvar, z) && !is_transformed(mu, logvar, z)
             ? GaussianLogProbSum::apply(mu, logvar, z, sample_weight, scale)
             : weighted_sum("gaussian_log_prob_sum", gaussian_log_prob().call(mu, logvar, z), sample_weight, scale);
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

WAKESLEEP_COMPOSITE(gaussian_log_prob_sum, gaussian_log_prob_sum_of)

}  // namespace wakesleep::autograd
