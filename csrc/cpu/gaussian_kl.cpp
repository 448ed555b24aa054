// KL(N(mu, diag e^logvar) || N(0, I)) = 1/2 sum_k [mu^2 + e^logvar - 1 - logvar] and its gradients, on the CPU.
#include "../densities.h"
#include "../gaussian.h"
#include "../registration.h"
#include "vec.h"

namespace wakesleep::cpu {
namespace {

at::Tensor gaussian_kl(const at::Tensor& mu,        // [*B, K]
                       const at::Tensor& logvar) {  // [*B, K]
  const GaussianKl call(mu, logvar);
  dispatch_floating(call.op, call.dtype(), [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = at::opmath_type<scalar_t>;
    const auto* mu_data = call.mu.const_data_ptr<scalar_t>();
    const auto* logvar_data = call.logvar.const_data_ptr<scalar_t>();
    auto* kl = call.kl.mutable_data_ptr<compute_t>();
    vectorized_parallel_for(call.rows.rows, grain_rows(call.K), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const auto offset = call.rows(row);
        kl[row] = compute_t(0.5) * sum_over_row<compute_t>(
                                       call.K, [](compute_t m, compute_t l) { return twice_gaussian_kl(m, l); },
                                       mu_data + offset.of[0], logvar_data + offset.of[1]);
      }
    });
  });
  return call.kl;
}

at::Tensor gaussian_kl_backward(const at::Tensor& grad,      // [*B]
                                const at::Tensor& mu,        // [*B, K]
                                const at::Tensor& logvar) {  // [*B, K]
  const GaussianKlBackward call(grad, mu, logvar);
  dispatch_floating(call.op, call.dtype(), [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = at::opmath_type<scalar_t>;
    const auto* mu_data = call.mu.const_data_ptr<scalar_t>();
    const auto* logvar_data = call.logvar.const_data_ptr<scalar_t>();
    const auto* grad_data = call.grad.const_data_ptr<compute_t>();
    auto* grad_parameters = call.grad_parameters.mutable_data_ptr<scalar_t>();
    vectorized_parallel_for(call.rows.rows, grain_rows(call.K), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const auto offset = call.rows(row);
        const compute_t upstream = grad_data[offset.of[2]];
        for_tiles(call.K, [&](int64_t column, int64_t columns) {
          Tile<compute_t> mu_tile, logvar_tile, mu_result, logvar_result;
          const compute_t* m = mu_tile.read(mu_data + offset.of[0] + column, columns);
          const compute_t* l = logvar_tile.read(logvar_data + offset.of[1] + column, columns);
          auto *mu_out = grad_parameters + 2 * row * call.K + column, *logvar_out = mu_out + call.K;
          compute_t *row_mu = mu_result.place_for(mu_out), *row_logvar = logvar_result.place_for(logvar_out);
          for_lanes<compute_t>(
              columns,
              [&](auto element, compute_t mean, compute_t log_variance) {
                element.store(row_mu, upstream * mean);
                element.store(row_logvar, upstream * gaussian_kl_grad_logvar(log_variance));
              },
              m, l);
          mu_result.store(mu_out, columns);
          logvar_result.store(logvar_out, columns);
        });
      }
    });
  });
  return call.grad_parameters;
}

}  // namespace

WAKESLEEP_KERNELS(CPU, m) {
  m.impl("gaussian_kl", gaussian_kl);
  m.impl("gaussian_kl_backward", gaussian_kl_backward);
}

}  // namespace wakesleep::cpu
