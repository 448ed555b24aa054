// log N(z; mu, diag e^logvar) = -1/2 sum_k [logvar + t^2 + log 2 pi], t = (z - mu) e^(-logvar/2), and its gradients,
// on the CPU.
#include <torch/library.h>

#include "../densities.h"
#include "../gaussian.h"
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
        const auto* m = mu_data + offset.of[0];
        const auto* l = logvar_data + offset.of[1];
        const auto* v = z_data + offset.of[2];
        const compute_t sum = sum_over_row<compute_t>(call.K, [&](int64_t k) {
          const auto logvar_k = static_cast<compute_t>(l[k]);
          const GaussianTerm<compute_t> term(static_cast<compute_t>(m[k]), logvar_k, static_cast<compute_t>(v[k]));
          return logvar_k + term.standardized * term.standardized;
        });
        log_prob[row] = gaussian_log_prob_of_sum(sum, call.K);
      }
    });
  });
  return call.log_prob;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> gaussian_log_prob_backward(const at::Tensor& grad,    // [*S, *B]
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
    dispatch_sums<scalar_t, 2>({&call.grad_mu, &call.grad_logvar}, [&](const auto& to, auto summed) {
      for_inner_pieces(call.rows, call.K, [&](const auto& piece, int64_t index, int64_t column, int64_t columns) {
        compute_t total_mu[kTile] = {}, total_logvar[kTile] = {}, row_mu[kTile];
        for_inner_rows<summed>(call.rows, piece, [&](const auto& offset) {
          const auto* m = mu_data + offset.of[0] + column;
          const auto* l = logvar_data + offset.of[1] + column;
          const auto* v = z_data + offset.of[2] + column;
          const compute_t upstream = grad_data[offset.of[3]];
          for_lanes<compute_t>(0, columns, [&](int64_t k, int) {
            const GaussianTerm<compute_t> term(static_cast<compute_t>(m[k]), static_cast<compute_t>(l[k]),
                                               static_cast<compute_t>(v[k]));
            row_mu[k] = upstream * term.grad_mu();
            total_mu[k] += row_mu[k];
            total_logvar[k] += upstream * term.grad_logvar();
          });
          if (with_grad_z) {
            auto* grad_z_row = grad_z_data + offset.of[4] + column;
            for_lanes<compute_t>(0, columns,
                                 [&](int64_t k, int) { grad_z_row[k] = static_cast<scalar_t>(-row_mu[k]); });
          }
        });
        store(total_mu, columns, to[0] + index * call.K + column);
        store(total_logvar, columns, to[1] + index * call.K + column);
      });
    });
  });
  return {call.grad_mu.total(), call.grad_logvar.total(), call.grad_z};
}

}  // namespace

TORCH_LIBRARY_IMPL(wakesleep_ext, CPU, m) {
  m.impl("gaussian_log_prob", gaussian_log_prob);
  m.impl("gaussian_log_prob_backward", gaussian_log_prob_backward);
}

}  // namespace wakesleep::cpu
