#include "../gaussian_kl.h"

#include "../densities.h"
#include "rowwise.cuh"

namespace wakesleep::cuda {
namespace {

template <typename scalar_t, int word>
struct GaussianKlRows {
  using compute_t = Compute<scalar_t>;
  const scalar_t* __restrict__ mu;
  const scalar_t* __restrict__ logvar;
  compute_t* __restrict__ kl;
  RowMap<2> rows;
  int64_t K;

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t row) const {
    const auto offset = rows(row);
    const compute_t sum = sum_over_row<compute_t, word>(
        team, K, [](compute_t m, compute_t l) { return twice_gaussian_kl(m, l); }, mu + offset.of[0],
        logvar + offset.of[1]);
    if (team.rank() == 0) {
      kl[row] = compute_t(0.5) * sum;
    }
  }
};

template <typename scalar_t, int word>
struct GaussianKlBackwardRows {
  using compute_t = Compute<scalar_t>;
  const scalar_t* __restrict__ mu;
  const scalar_t* __restrict__ logvar;
  const compute_t* __restrict__ grad;
  scalar_t* __restrict__ grad_parameters;
  RowMap<3> rows;
  int64_t K;

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t row) const {
    const auto offset = rows(row);
    const scalar_t* m = mu + offset.of[0];
    const scalar_t* l = logvar + offset.of[1];
    const compute_t upstream = grad[offset.of[2]];
    scalar_t* out = grad_parameters + row * 2 * K;
    for_words<scalar_t, word, word>(team, K, 0, [&](auto span) {
      auto m_packet = load<compute_t>(span, m);
      auto l_packet = load<compute_t>(span, l);
#pragma unroll
      for (int i = 0; i < span.size; ++i) {
        m_packet.value[i] *= upstream;
        l_packet.value[i] = upstream * gaussian_kl_grad_logvar(l_packet.value[i]);
      }
      store(span, m_packet, out);
      store(span, l_packet, out + K);
    });
  }
};

}  // namespace

void compute(const GaussianKl& call, Stream stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    const auto* mu = static_cast<const scalar_t*>(call.mu);
    const auto* logvar = static_cast<const scalar_t*>(call.logvar);
    const auto all = places(mu, call.rows, 0) | places(logvar, call.rows, 1) | call.K;
    dispatch_word<kPacket<scalar_t>>(all, [&](auto word) {
      launch_rows_of<scalar_t, word>(
          stream, call.rows.rows, call.K,
          GaussianKlRows<scalar_t, word>{mu, logvar, static_cast<Compute<scalar_t>*>(call.kl), call.rows, call.K});
    });
  });
}

void compute(const GaussianKlBackward& call, Stream stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    const auto* mu = static_cast<const scalar_t*>(call.mu);
    const auto* logvar = static_cast<const scalar_t*>(call.logvar);
    auto* grad_parameters = static_cast<scalar_t*>(call.grad_parameters);
    const auto all = places(mu, call.rows, 0) | places(logvar, call.rows, 1) | places(grad_parameters) | call.K;
    dispatch_word<kPacket<scalar_t>>(all, [&](auto word) {
      launch_free_rows<scalar_t, word>(
          stream, call.rows.rows, call.K,
          GaussianKlBackwardRows<scalar_t, word>{mu, logvar, static_cast<const Compute<scalar_t>*>(call.grad),
                                                 grad_parameters, call.rows, call.K});
    });
  });
}

}  // namespace wakesleep::cuda
