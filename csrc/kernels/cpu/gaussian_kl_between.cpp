#include "../gaussian_kl_between.h"

#include "../densities.h"
#include "tiles.h"

namespace wakesleep::cpu {
namespace {

// Pointers to the same columns of the four parameters, or of their gradients.
template <typename T>
struct Columns {
  T *mu, *logvar, *prior_mu, *prior_logvar;
};

// Writes the gradients of one row, or adds those of the prior if `adds` is true.
template <bool adds, typename compute_t>
WAKESLEEP_INLINE void put_gradients(int64_t columns, compute_t upstream, Columns<const compute_t> of,
                                    Columns<compute_t> grad) {
  for_lanes<compute_t>(
      columns,
      [&](auto element, compute_t mean, compute_t log_variance, compute_t prior_mean, compute_t prior_log_variance) {
        const GaussianKlTerm<compute_t> term(mean, log_variance, prior_mean, prior_log_variance);
        const compute_t of_mu = upstream * term.grad_mu();
        element.store(grad.mu, of_mu);
        element.store(grad.logvar, upstream * term.grad_logvar());
        element.template put<adds>(grad.prior_mu, -of_mu);
        element.template put<adds>(grad.prior_logvar, upstream * term.grad_prior_logvar());
      },
      of.mu, of.logvar, of.prior_mu, of.prior_logvar);
}

// Returns a pointer to an element of an array, or null if the array is null.
template <typename T>
T* element_of(T* array, int64_t index) {
  return array == nullptr ? nullptr : array + index;
}

}  // namespace

void compute(const GaussianKlBetween& call, Stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = Compute<scalar_t>;
    const auto* mu = static_cast<const scalar_t*>(call.mu);
    const auto* logvar = static_cast<const scalar_t*>(call.logvar);
    const auto* prior_mu = static_cast<const scalar_t*>(call.prior_mu);
    const auto* prior_logvar = static_cast<const scalar_t*>(call.prior_logvar);
    auto* kl = static_cast<compute_t*>(call.kl);
    vectorized_parallel_for(call.rows.rows, grain_rows(call.K), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const auto offset = call.rows(row);
        const compute_t sum = sum_over_row<compute_t>(
            call.K,
            [](compute_t m, compute_t l, compute_t prior_m, compute_t prior_l) {
              return GaussianKlTerm<compute_t>(m, l, prior_m, prior_l).twice_kl();
            },
            mu + offset.of[0], logvar + offset.of[1], prior_mu + offset.of[2], prior_logvar + offset.of[3]);
        kl[row] = compute_t(0.5) * sum;
      }
    });
  });
}

void compute(const GaussianKlBetweenBackward& call, Stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = Compute<scalar_t>;
    const auto* mu = static_cast<const scalar_t*>(call.mu);
    const auto* logvar = static_cast<const scalar_t*>(call.logvar);
    const auto* prior_mu = static_cast<const scalar_t*>(call.prior_mu);
    const auto* prior_logvar = static_cast<const scalar_t*>(call.prior_logvar);
    const auto* grad = static_cast<const compute_t*>(call.grad);
    auto* grad_parameters = static_cast<scalar_t*>(call.grad_parameters);
    dispatch_sum<scalar_t>(call.grad_prior, [&](auto* grad_prior, auto summed) {
      for_inner_pieces(call.rows, call.K, [&](const auto& piece, int64_t index, int64_t column, int64_t columns) {
        auto* prior_mu_out = element_of(grad_prior, 2 * index * call.K + column);
        auto* prior_logvar_out = element_of(prior_mu_out, call.K);
        Tile<compute_t> prior_mu_result, prior_logvar_result;
        compute_t* row_prior_mu = prior_mu_result.place_for(prior_mu_out);
        compute_t* row_prior_logvar = prior_logvar_result.place_for(prior_logvar_out);
        if constexpr (summed) {
          std::fill_n(row_prior_mu, columns, compute_t(0));
          std::fill_n(row_prior_logvar, columns, compute_t(0));
        }
        for_inner_rows<summed>(call.rows, piece, [&](const auto& offset) {
          Tile<compute_t> m, l, prior_m, prior_l, mu_result, logvar_result;
          const Columns<const compute_t> of = {m.read(mu + offset.of[0] + column, columns),
                                               l.read(logvar + offset.of[1] + column, columns),
                                               prior_m.read(prior_mu + offset.of[2] + column, columns),
                                               prior_l.read(prior_logvar + offset.of[3] + column, columns)};
          auto* mu_out = element_of(grad_parameters, offset.of[5] + column);
          auto* logvar_out = element_of(mu_out, call.K);
          put_gradients<summed>(
              columns, grad[offset.of[4]], of,
              {mu_result.place_for(mu_out), logvar_result.place_for(logvar_out), row_prior_mu, row_prior_logvar});
          mu_result.store(mu_out, columns);
          logvar_result.store(logvar_out, columns);
        });
        prior_mu_result.store(prior_mu_out, columns);
        prior_logvar_result.store(prior_logvar_out, columns);
      });
    });
  });
}

}  // namespace wakesleep::cpu
