#include "../gaussian_log_prob.h"

#include "../densities.h"
#include "tiles.h"

namespace wakesleep::cpu {
namespace {

// Writes the gradients of one row, or adds those of mu and logvar if `adds` is true.
template <bool adds, bool with_grad_z, typename compute_t>
WAKESLEEP_INLINE void put_gradients(int64_t columns, compute_t upstream, const compute_t* mu, const compute_t* logvar,
                                    const compute_t* z, compute_t* grad_mu, compute_t* grad_logvar, compute_t* grad_z) {
  for_lanes<compute_t>(
      columns,
      [&](auto element, compute_t mean, compute_t log_variance, compute_t value) {
        const GaussianTerm<compute_t> term(mean, log_variance, value);
        const compute_t of_mu = upstream * term.grad_mu();
        element.template put<adds>(grad_mu, of_mu);
        element.template put<adds>(grad_logvar, upstream * term.grad_logvar());
        if constexpr (with_grad_z) {
          element.store(grad_z, -of_mu);
        }
      },
      mu, logvar, z);
}

}  // namespace

void compute(const GaussianLogProb& call, Stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = Compute<scalar_t>;
    const auto* mu = static_cast<const scalar_t*>(call.mu);
    const auto* logvar = static_cast<const scalar_t*>(call.logvar);
    const auto* z = static_cast<const scalar_t*>(call.z);
    auto* log_prob = static_cast<compute_t*>(call.log_prob);
    vectorized_parallel_for(call.rows.rows, grain_rows(call.K), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const auto offset = call.rows(row);
        const compute_t sum = sum_over_row<compute_t>(
            call.K,
            [](compute_t m, compute_t l, compute_t v) {
              const compute_t t = GaussianTerm<compute_t>(m, l, v).standardized;
              return l + t * t;
            },
            mu + offset.of[0], logvar + offset.of[1], z + offset.of[2]);
        log_prob[row] = gaussian_log_prob_of_sum(sum, call.K);
      }
    });
  });
}

void compute(const GaussianLogProbBackward& call, Stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = Compute<scalar_t>;
    const auto* mu = static_cast<const scalar_t*>(call.mu);
    const auto* logvar = static_cast<const scalar_t*>(call.logvar);
    const auto* z = static_cast<const scalar_t*>(call.z);
    const auto* grad = static_cast<const compute_t*>(call.grad);
    auto* grad_z = static_cast<scalar_t*>(call.grad_z);
    const bool with_grad_z = grad_z != nullptr;
    dispatch_sum<scalar_t>(call.parameters, [&](auto* to, auto summed) {
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
          const compute_t* m = mu_tile.read(mu + offset.of[0] + column, columns);
          const compute_t* l = logvar_tile.read(logvar + offset.of[1] + column, columns);
          const compute_t* v = z_tile.read(z + offset.of[2] + column, columns);
          const compute_t upstream = grad[offset.of[3]];
          auto* z_out = grad_z + (with_grad_z ? offset.of[4] + column : 0);
          compute_t* row_z = z_result.place_for(z_out);
          if (with_grad_z) {
            put_gradients<summed, true>(columns, upstream, m, l, v, grad_mu, grad_logvar, row_z);
            z_result.store(z_out, columns);
          } else {
            put_gradients<summed, false>(columns, upstream, m, l, v, grad_mu, grad_logvar, row_z);
          }
        });
        mu_result.store(mu_out, columns);
        logvar_result.store(logvar_out, columns);
      });
    });
  });
}

}  // namespace wakesleep::cpu
