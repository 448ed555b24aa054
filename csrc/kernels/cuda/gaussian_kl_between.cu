#include "../gaussian_kl_between.h"

#include "../densities.h"
#include "rowwise.cuh"

namespace wakesleep::cuda {
namespace {

template <typename scalar_t, int word>
struct GaussianKlBetweenRows {
  using compute_t = Compute<scalar_t>;
  const scalar_t* __restrict__ mu;
  const scalar_t* __restrict__ logvar;
  const scalar_t* __restrict__ prior_mu;
  const scalar_t* __restrict__ prior_logvar;
  compute_t* __restrict__ kl;
  RowMap<4> rows;
  int64_t K;

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t row) const {
    const auto offset = rows(row);
    const compute_t sum = sum_over_row<compute_t, word>(
        team, K,
        [](compute_t m, compute_t l, compute_t prior_m, compute_t prior_l) {
          return GaussianKlTerm<compute_t>(m, l, prior_m, prior_l).twice_kl();
        },
        mu + offset.of[0], logvar + offset.of[1], prior_mu + offset.of[2], prior_logvar + offset.of[3]);
    if (team.rank() == 0) {
      kl[row] = compute_t(0.5) * sum;
    }
  }
};

template <typename scalar_t, bool summed, int word>
struct GaussianKlBetweenBackwardRows {
  using compute_t = Compute<scalar_t>;
  using grad_t = std::conditional_t<summed, compute_t, scalar_t>;
  const scalar_t* __restrict__ mu;
  const scalar_t* __restrict__ logvar;
  const scalar_t* __restrict__ prior_mu;
  const scalar_t* __restrict__ prior_logvar;
  const compute_t* __restrict__ grad;
  scalar_t* __restrict__ grad_parameters;  // null if not needed
  grad_t* __restrict__ grad_prior;         // null if not needed
  RowGroups<6> rows;
  int64_t K;

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t index) const {
    const auto piece = inner_piece(rows, index);
    const auto& first = piece.offset;
    const scalar_t* prior_m_row = prior_mu + first.of[2];
    const scalar_t* prior_l_row = prior_logvar + first.of[3];
    for_words<scalar_t, word, word, summed>(team, K, 0, [&](auto span) {
      const auto prior_m = load<compute_t>(span, prior_m_row);
      const auto prior_l = load<compute_t>(span, prior_l_row);
      Packet<compute_t, span.size> total_mu = {}, total_logvar = {};
      for_inner_rows<summed>(rows, piece, [&](const auto& offset) {
        auto m = load<compute_t>(span, mu + offset.of[0]);
        auto l = load<compute_t>(span, logvar + offset.of[1]);
        const compute_t upstream = grad[offset.of[4]];
#pragma unroll
        for (int i = 0; i < span.size; ++i) {
          const GaussianKlTerm<compute_t> term(m.value[i], l.value[i], prior_m.value[i], prior_l.value[i]);
          m.value[i] = upstream * term.grad_mu();
          l.value[i] = upstream * term.grad_logvar();
          total_mu.value[i] -= m.value[i];
          total_logvar.value[i] += upstream * term.grad_prior_logvar();
        }
        if (grad_parameters != nullptr) {
          store(span, m, grad_parameters + offset.of[5]);
          store(span, l, grad_parameters + offset.of[5] + K);
        }
      });
      if (grad_prior != nullptr) {
        store(span, total_mu, grad_prior + index * 2 * K);
        store(span, total_logvar, grad_prior + index * 2 * K + K);
      }
    });
  }
};

}  // namespace

void compute(const GaussianKlBetween& call, Stream stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    const auto* mu = static_cast<const scalar_t*>(call.mu);
    const auto* logvar = static_cast<const scalar_t*>(call.logvar);
    const auto* prior_mu = static_cast<const scalar_t*>(call.prior_mu);
    const auto* prior_logvar = static_cast<const scalar_t*>(call.prior_logvar);
    const auto all = places(mu, call.rows, 0) | places(logvar, call.rows, 1) | places(prior_mu, call.rows, 2) |
                     places(prior_logvar, call.rows, 3) | call.K;
    dispatch_word<kPacket<scalar_t>>(all, [&](auto word) {
      launch_rows_of<scalar_t, word>(
          stream, call.rows.rows, call.K,
          GaussianKlBetweenRows<scalar_t, word>{mu, logvar, prior_mu, prior_logvar,
                                                static_cast<Compute<scalar_t>*>(call.kl), call.rows, call.K});
    });
  });
}

void compute(const GaussianKlBetweenBackward& call, Stream stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    const auto* mu = static_cast<const scalar_t*>(call.mu);
    const auto* logvar = static_cast<const scalar_t*>(call.logvar);
    const auto* prior_mu = static_cast<const scalar_t*>(call.prior_mu);
    const auto* prior_logvar = static_cast<const scalar_t*>(call.prior_logvar);
    auto* grad_parameters = static_cast<scalar_t*>(call.grad_parameters);
    dispatch_sum<scalar_t>(call.grad_prior, [&](auto* to, auto summed) {
      const auto all = places(mu, call.rows, 0) | places(logvar, call.rows, 1) | places(prior_mu, call.rows, 2) |
                       places(prior_logvar, call.rows, 3) | places(grad_parameters, call.rows, 5) | places(to) | call.K;
      dispatch_word<kPacket<scalar_t>>(all, [&](auto word) {
        launch_free_rows<scalar_t, word>(
            stream, inner_pieces(call.rows.inner.rows) * call.rows.outer.rows, call.K,
            GaussianKlBetweenBackwardRows<scalar_t, summed, word>{mu, logvar, prior_mu, prior_logvar,
                                                                  static_cast<const Compute<scalar_t>*>(call.grad),
                                                                  grad_parameters, to, call.rows, call.K});
      });
    });
  });
}

}  // namespace wakesleep::cuda
