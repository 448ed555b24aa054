#include "../gaussian_log_prob.h"

#include "../densities.h"
#include "rowwise.cuh"

namespace wakesleep::cuda {
namespace {

template <typename scalar_t, int word>
struct GaussianLogProbRows {
  using compute_t = Compute<scalar_t>;
  const scalar_t* __restrict__ mu;
  const scalar_t* __restrict__ logvar;
  const scalar_t* __restrict__ z;
  compute_t* __restrict__ log_prob;
  RowMap<3> rows;
  int64_t K;

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t row) const {
    const auto offset = rows(row);
    const compute_t sum = sum_over_row<compute_t, word>(
        team, K,
        [](compute_t v, compute_t m, compute_t l) {
          const compute_t t = GaussianTerm<compute_t>(m, l, v).standardized;
          return l + t * t;
        },
        z + offset.of[2], mu + offset.of[0], logvar + offset.of[1]);
    if (team.rank() == 0) {
      log_prob[row] = gaussian_log_prob_of_sum(sum, K);
    }
  }
};

template <typename scalar_t, bool summed, int word>
struct GaussianLogProbBackwardRows {
  using compute_t = Compute<scalar_t>;
  using grad_t = std::conditional_t<summed, compute_t, scalar_t>;
  const scalar_t* __restrict__ mu;
  const scalar_t* __restrict__ logvar;
  const scalar_t* __restrict__ z;
  const compute_t* __restrict__ grad;
  grad_t* __restrict__ grad_parameters;
  scalar_t* __restrict__ grad_z;  // null if not needed
  RowGroups<5> rows;
  int64_t K;

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t index) const {
    const auto piece = inner_piece(rows, index);
    const scalar_t* m_row = mu + piece.offset.of[0];
    const scalar_t* l_row = logvar + piece.offset.of[1];
    grad_t* out = grad_parameters + index * 2 * K;
    for_words<scalar_t, word, word, summed>(team, K, 0, [&](auto span) {
      const auto m = load<compute_t>(span, m_row);
      const auto l = load<compute_t>(span, l_row);
      Packet<compute_t, span.size> total_mu = {}, total_logvar = {};
      for_inner_rows<summed>(rows, piece, [&](const auto& offset) {
        auto v = load<compute_t>(span, z + offset.of[2]);
        const compute_t upstream = grad[offset.of[3]];
#pragma unroll
        for (int i = 0; i < span.size; ++i) {
          const GaussianTerm<compute_t> term(m.value[i], l.value[i], v.value[i]);
          v.value[i] = -upstream * term.grad_mu();
          total_mu.value[i] -= v.value[i];
          total_logvar.value[i] += upstream * term.grad_logvar();
        }
        if (grad_z != nullptr) {
          store(span, v, grad_z + offset.of[4]);
        }
      });
      store(span, total_mu, out);
      store(span, total_logvar, out + K);
    });
  }
};

}  // namespace

void compute(const GaussianLogProb& call, Stream stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    const auto* mu = static_cast<const scalar_t*>(call.mu);
    const auto* logvar = static_cast<const scalar_t*>(call.logvar);
    const auto* z = static_cast<const scalar_t*>(call.z);
    const auto all = places(mu, call.rows, 0) | places(logvar, call.rows, 1) | places(z, call.rows, 2) | call.K;
    dispatch_word<kPacket<scalar_t>>(all, [&](auto word) {
      launch_rows_of<scalar_t, word>(
          stream, call.rows.rows, call.K,
          GaussianLogProbRows<scalar_t, word>{mu, logvar, z, static_cast<Compute<scalar_t>*>(call.log_prob), call.rows,
                                              call.K});
    });
  });
}

void compute(const GaussianLogProbBackward& call, Stream stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    const auto* mu = static_cast<const scalar_t*>(call.mu);
    const auto* logvar = static_cast<const scalar_t*>(call.logvar);
    const auto* z = static_cast<const scalar_t*>(call.z);
    auto* grad_z = static_cast<scalar_t*>(call.grad_z);
    dispatch_sum<scalar_t>(call.parameters, [&](auto* to, auto summed) {
      const auto all = places(mu, call.rows, 0) | places(logvar, call.rows, 1) | places(z, call.rows, 2) |
                       places(grad_z, call.rows, 4) | places(to) | call.K;
      dispatch_word<kPacket<scalar_t>>(all, [&](auto word) {
        launch_free_rows<scalar_t, word>(
            stream, inner_pieces(call.rows.inner.rows) * call.rows.outer.rows, call.K,
            GaussianLogProbBackwardRows<scalar_t, summed, word>{
                mu, logvar, z, static_cast<const Compute<scalar_t>*>(call.grad), to, grad_z, call.rows, call.K});
      });
    });
  });
}

}  // namespace wakesleep::cuda
