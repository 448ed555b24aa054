#include "../gaussian_kl.h"

#include "../densities.h"
#include "tiles.h"

namespace wakesleep::cpu {

void compute(const GaussianKl& call, Stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = Compute<scalar_t>;
    const auto* mu = static_cast<const scalar_t*>(call.mu);
    const auto* logvar = static_cast<const scalar_t*>(call.logvar);
    auto* kl = static_cast<compute_t*>(call.kl);
    vectorized_parallel_for(call.rows.rows, grain_rows(call.K), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const auto offset = call.rows(row);
        kl[row] = compute_t(0.5) * sum_over_row<compute_t>(
                                       call.K, [](compute_t m, compute_t l) { return twice_gaussian_kl(m, l); },
                                       mu + offset.of[0], logvar + offset.of[1]);
      }
    });
  });
}

void compute(const GaussianKlBackward& call, Stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = Compute<scalar_t>;
    const auto* mu = static_cast<const scalar_t*>(call.mu);
    const auto* logvar = static_cast<const scalar_t*>(call.logvar);
    const auto* grad = static_cast<const compute_t*>(call.grad);
    auto* grad_parameters = static_cast<scalar_t*>(call.grad_parameters);
    vectorized_parallel_for(call.rows.rows, grain_rows(call.K), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const auto offset = call.rows(row);
        const compute_t upstream = grad[offset.of[2]];
        for_tiles(call.K, [&](int64_t column, int64_t columns) {
          Tile<compute_t> mu_tile, logvar_tile, mu_result, logvar_result;
          const compute_t* m = mu_tile.read(mu + offset.of[0] + column, columns);
          const compute_t* l = logvar_tile.read(logvar + offset.of[1] + column, columns);
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
}

}  // namespace wakesleep::cpu
