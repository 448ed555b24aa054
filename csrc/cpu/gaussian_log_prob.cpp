// log N(z; mu, diag e^logvar) = -1/2 sum_k [logvar + t^2 + log 2 pi], t = (z - mu) e^(-logvar/2), and its gradients,
// on the CPU.
#include "../densities.h"
#include "../gaussian.h"
#include "../registration.h"
#include "vec.h"

namespace wakesleep::cpu {
namespace {

at::Tensor gaussian_log_prob(const at::Tensor& mu,      // [*B, K]
                             const at::Tensor& logvar,  // [*B, K]
                             const at::Tensor& z) {     // [*S, *B, K]
  const GaussianLogProb call(mu, logvar, z);
  dispatch_floating(call.op, call.dtype(), [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = at::opmath_type<scalar_t>;
    const auto* mu_data = call.mu.const_data_ptr<scalar_t>();
    const auto* logvar_data = call.logvar.const_data_ptr<scalar_t>();
    const auto* z_data = call.z.const_data_ptr<scalar_t>();
    auto* log_prob = call.log_prob.mutable_data_ptr<compute_t>();
    vectorized_parallel_for(call.rows.rows, grain_rows(call.K), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const auto offset = call.rows(row);
        const compute_t sum = sum_over_row<compute_t>(
            call.K,
            [](compute_t m, compute_t l, compute_t v) {
              const compute_t t = GaussianTerm<compute_t>(m, l, v).standardized;
              return l + t * t;
            },
            mu_data + offset.of[0], logvar_data + offset.of[1], z_data + offset.of[2]);
        log_prob[row] = gaussian_log_prob_of_sum(sum, call.K);
      }
    });
  });
  return call.log_prob;
}

std::tuple<at::Tensor, at::Tensor> gaussian_log_prob_backward(const at::Tensor& grad,    // [*S, *B]
                                                              const at::Tensor& mu,      // [*B, K]
                                                              const at::Tensor& logvar,  // [*B, K]
                                                              const at::Tensor& z,       // [*S, *B, K]
                                                              bool with_grad_z) {
  const GaussianLogProbBackward call(grad, mu, logvar, z, with_grad_z);
  dispatch_floating(call.op, call.dtype(), [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = at::opmath_type<scalar_t>;
    const auto* mu_data = call.mu.const_data_ptr<scalar_t>();
    const auto* logvar_data = call.logvar.const_data_ptr<scalar_t>();
    const auto* z_data = call.z.const_data_ptr<scalar_t>();
    const auto* grad_data = call.grad.const_data_ptr<compute_t>();
    auto* grad_z_data = call.grad_z.mutable_data_ptr<scalar_t>();
    dispatch_sum<scalar_t>(call.grad_parameters, [&](auto* to, auto summed) {
      for_inner_pieces(call.rows, call.K, [&](const auto& piece, int64_t index, int64_t column, int64_t columns) {
        auto *mu_out = to + 2 * index * call.K + column, *logvar_out = mu_out + call.K;
        Tile<compute_t> mu_result, logvar_result;
        compute_t *grad_mu = mu_result.place_for(mu_out), *grad_logvar = logvar_result.place_for(logvar_out);
        if constexpr (summed) {
          std::fill_n(grad_mu, columns, compute_t(0));
          std::fill_n(grad_logvar, columns, compute_t(0));
        }
        for_inner_rows<summed>(call.rows, piece, [&](const auto& offset) {
          Tile<compute_t> mu_tile, logvar_tile, z_tile, z_result;
          const compute_t* m = mu_tile.read(mu_data + offset.of[0] + column, columns);
          const compute_t* l = logvar_tile.read(logvar_data + offset.of[1] + column, columns);
          const compute_t* v = z_tile.read(z_data + offset.of[2] + column, columns);
          const compute_t upstream = grad_data[offset.of[3]];
          auto* z_out = grad_z_data + (with_grad_z ? offset.of[4] + column : 0);
          compute_t* grad_z = z_result.place_for(z_out);
          const auto add_terms = [&](auto with_z) {
            for_lanes<compute_t>(
                columns,
                [&](auto element, compute_t mean, compute_t log_variance, compute_t value) {
                  const GaussianTerm<compute_t> term(mean, log_variance, value);
                  const compute_t row_mu = upstream * term.grad_mu();
                  element.template put<summed>(grad_mu, row_mu);
                  element.template put<summed>(grad_logvar, upstream * term.grad_logvar());
                  if constexpr (with_z) {
                    element.store(grad_z, -row_mu);
                  }
                },
                m, l, v);
          };
          if (with_grad_z) {
            add_terms(std::true_type{});
            z_result.store(z_out, columns);
          } else {
            add_terms(std::false_type{});
          }
        });
        mu_result.store(mu_out, columns);
        logvar_result.store(logvar_out, columns);
      });
    });
  });
  return {call.grad_parameters.total(), call.grad_z};
}

}  // namespace

WAKESLEEP_KERNELS(CPU, m) {
  m.impl("gaussian_log_prob", gaussian_log_prob);
  m.impl("gaussian_log_prob_backward", gaussian_log_prob_backward);
}

}  // namespace wakesleep::cpu
