// Gradients of z = mu + sigma eps and of log q(z). For z, dz/dmu = 1 and dz/dlogvar = (z - mu) / 2. For log q(z), where
// z also depends on mu and logvar, dlog q/dmu = 0 and dlog q/dlogvar = -1/2. The graph saves the key instead of eps.
#include <ATen/ops/addcmul.h>

#include <cmath>
#include <numeric>

#include "function.h"

namespace wakesleep::autograd {
namespace {

WAKESLEEP_OPERATOR(gaussian_rsample_log_prob, Pair(const Tensor&, const Tensor&, const Tensor&, c10::SymIntArrayRef))
WAKESLEEP_OPERATOR(gaussian_rsample_backward, Tensor(const OptionalTensor&, const OptionalTensor&, const Tensor&,
                                                     const Tensor&, const Tensor&, c10::SymIntArrayRef))

struct Rsample : Function<Rsample> {
  static constexpr auto name = "gaussian_rsample";

  static variable_list forward(AutogradContext* context, const Tensor& mu, const Tensor& logvar, const Tensor& key,
                               c10::SymIntArrayRef sample_shape, bool with_log_prob) {
    context->save_for_backward({mu, logvar, key});
    context->saved_data["sample_shape"] = sample_shape.vec();
    context->set_materialize_grads(false);
    if (with_log_prob) {
      const auto [z, log_prob] = below(gaussian_rsample_log_prob(), mu, logvar, key, sample_shape);
      return {z, log_prob};
    }
    return {below(gaussian_rsample(), mu, logvar, key, sample_shape)};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &mu = saved[0], &logvar = saved[1], &key = saved[2];
    const auto grad = [&](size_t output) {
      return output < grads.size() && grads[output].defined() ? OptionalTensor(grads[output]) : std::nullopt;
    };
    const auto [grad_mu, grad_logvar] = halves(gaussian_rsample_backward().call(
        grad(0), grad(1), mu, logvar, key, context->saved_data["sample_shape"].toSymIntVector()));
    return {sum_like(grad_mu, mu), sum_like(grad_logvar, logvar), Tensor(), Tensor(), Tensor()};
  }
};

// Returns z and log q(z) as differentiable operations. They keep eps, which Rsample would draw again under torch.func.
struct DifferentiableRsample {
  Tensor logvar, eps, z;

  DifferentiableRsample(const Tensor& mu_in, const Tensor& logvar_in, const Tensor& key,
                        c10::SymIntArrayRef sample_shape) {
    const auto type = c10::promoteTypes(mu_in.scalar_type(), logvar_in.scalar_type());
    const auto shape = at::infer_size_symdimvector(mu_in.sym_sizes(), logvar_in.sym_sizes());
    const auto in_draw = [&](const Tensor& parameter) {
      Tensor value = parameter.to(compute_dtype(type));
      const int64_t members = key.dim() - 1;
      for (size_t i = 0; members > 0 && i < sample_shape.size(); ++i) {
        value = (i == 0 ? value.expand_symint(shape) : value).unsqueeze(members);  // samples follow the members
      }
      return value;
    };
    const Tensor origin = at::zeros_symint(shape, mu_in.options().dtype(compute_dtype(type)));
    eps = gaussian_rsample().call(origin, origin, key, sample_shape);
    logvar = in_draw(logvar_in);
    z = at::addcmul(in_draw(mu_in), (0.5 * logvar).exp(), eps).to(type);
  }

  Tensor log_prob() const { return -0.5 * (logvar + eps * eps + std::log(2 * M_PI)).sum(-1); }
};

Tensor gaussian_rsample_of(const Tensor& mu, const Tensor& logvar, const Tensor& key,
                           c10::SymIntArrayRef sample_shape) {
  if (needs_gradient(mu, logvar) && is_transformed(mu, logvar)) {
    return DifferentiableRsample(mu, logvar, key, sample_shape).z;
  }
  return needs_gradient(mu, logvar) ? Rsample::apply(mu, logvar, key, sample_shape, false)[0]
                                    : below(gaussian_rsample(), mu, logvar, key, sample_shape);
}

Pair gaussian_rsample_log_prob_of(const Tensor& mu, const Tensor& logvar, const Tensor& key,
                                  c10::SymIntArrayRef sample_shape) {
  if (!needs_gradient(mu, logvar)) {
    return below(gaussian_rsample_log_prob(), mu, logvar, key, sample_shape);
  }
  if (is_transformed(mu, logvar)) {
    const DifferentiableRsample drawn(mu, logvar, key, sample_shape);
    return {drawn.z, drawn.log_prob()};
  }
  const variable_list outputs = Rsample::apply(mu, logvar, key, sample_shape, true);
  return {outputs[0], outputs[1]};
}

// Double backward: autograd differentiates this formula instead of the kernel. It obtains eps by drawing from N(0, I)
// with the same key.
Tensor gaussian_rsample_backward_of(const OptionalTensor& grad_z, const OptionalTensor& grad_log_prob, const Tensor& mu,
                                    const Tensor& logvar, const Tensor& key, c10::SymIntArrayRef sample_shape) {
  const bool has_z = grad_z && grad_z->defined(), has_log_prob = grad_log_prob && grad_log_prob->defined();
  if (!needs_gradient(mu, logvar) && !(has_z && needs_gradient(*grad_z)) &&
      !(has_log_prob && needs_gradient(*grad_log_prob))) {
    return below(gaussian_rsample_backward(), grad_z, grad_log_prob, mu, logvar, key, sample_shape);
  }
  const auto shape = at::infer_size_symdimvector(mu.sym_sizes(), logvar.sym_sizes());
  std::vector<int64_t> samples(sample_shape.size());  // the dimensions of the samples follow those of the keys
  std::iota(samples.begin(), samples.end(), key.dim() - 1);
  const auto sum = [&](const Tensor& tensor) { return samples.empty() ? tensor : tensor.sum(samples); };
  Tensor grad_mu = at::zeros_symint(shape, mu.options()), grad_logvar = grad_mu;
  if (has_z) {
    const Tensor eps = gaussian_rsample().call(grad_mu, grad_mu, key, sample_shape);
    grad_mu = sum(*grad_z);
    grad_logvar = 0.5 * sum(*grad_z * eps) * (0.5 * logvar).exp();
  }
  if (has_log_prob) {
    grad_logvar = grad_logvar - 0.5 * sum(*grad_log_prob).unsqueeze(-1);
  }
  return at::cat({grad_mu, grad_logvar}, -1);
}

}  // namespace

TORCH_LIBRARY_IMPL(wakesleep_ext, Autograd, m) {
  m.impl("gaussian_rsample", gaussian_rsample_of);
  m.impl("gaussian_rsample_log_prob", gaussian_rsample_log_prob_of);
  m.impl("gaussian_rsample_backward", gaussian_rsample_backward_of);
}

}  // namespace wakesleep::autograd
