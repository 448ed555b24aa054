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
          const compute_t t = GaussianTerm<compute_t>(m, gaussian_inverse_sigma(l), v).standardized;
          return l + t * t;
        },
        z + offset.of[2], mu + offset.of[0], logvar + offset.of[1]);
    if (team.rank() == 0) {
      log_prob[row] = gaussian_log_prob_of_sum(sum, K);
    }
  }
};

// The operands and the gradients of a call.
template <typename scalar_t, bool summed, int word>
struct GaussianGradientRows {
  using compute_t = Compute<scalar_t>;
  using grad_t = std::conditional_t<summed, compute_t, scalar_t>;
  const scalar_t* __restrict__ mu;
  const scalar_t* __restrict__ logvar;
  const scalar_t* __restrict__ z;
  grad_t* __restrict__ grad_parameters;
  scalar_t* __restrict__ grad_z;  // null if not needed
  RowGroups<5> rows;
  int64_t K;

  // Writes the gradients of a piece of rows. upstream_of(offset) returns the upstream gradient of a row. The function
  // also calls also_for(span, i, logvar, t, upstream gradient) for every element i of a span.
  template <int threads, typename Upstream, typename Body>
  __device__ void write(Team<threads> team, int64_t index, const Upstream& upstream_of, const Body& also_for) const {
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
        const compute_t upstream = upstream_of(offset);
#pragma unroll
        for (int i = 0; i < span.size; ++i) {
          const GaussianTerm<compute_t> term(m.value[i], gaussian_inverse_sigma(l.value[i]), v.value[i]);
          also_for(span, i, l.value[i], term.standardized, upstream);
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

template <typename scalar_t, bool summed, int word>
struct GaussianLogProbBackwardRows {
  using compute_t = Compute<scalar_t>;
  GaussianGradientRows<scalar_t, summed, word> gradients;
  const compute_t* __restrict__ grad;

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t index) const {
    gradients.write(
        team, index, [&](const auto& offset) { return grad[offset.of[3]]; },
        [](auto, int, compute_t, compute_t, compute_t) {});
  }
};

// Writes the gradients of sum_n w_n log_prob_n.
template <typename scalar_t, bool summed, int word>
struct GaussianLogProbAndGradientsRows {
  using compute_t = Compute<scalar_t>;
  GaussianGradientRows<scalar_t, summed, word> gradients;
  const compute_t* __restrict__ upstream;  // null if all are 1
  compute_t scale;

  // Returns this thread's part of -2 sum_n w_n log_prob_n over the rows of a piece.
  template <int threads>
  __device__ compute_t operator()(Team<threads> team, int64_t index) const {
    compute_t sum = 0;
    gradients.write(
        team, index, [&](const auto& offset) { return upstream == nullptr ? scale : scale * upstream[offset.of[3]]; },
        [&](auto span, int i, compute_t l, compute_t t, compute_t weight) {
          sum += span.holds(i) ? weight * (l + t * t + compute_t(kLogTwoPi)) : compute_t(0);
        });
    return sum;
  }
};

// A block computes a part of the sum. Its teams divide the pieces.
template <typename Rows>
__global__ void __launch_bounds__(kBlockThreads, 2)
    summed_parts_kernel(const Rows rows, typename Rows::compute_t* sums, int64_t pieces, int64_t pieces_of_part,
                        int64_t parts, const Team<> team) {
  wait_for_previous();
  using compute_t = typename Rows::compute_t;
  for (int64_t part = blockIdx.x; part < parts; part += gridDim.x) {
    const int64_t last = min(pieces, (part + 1) * pieces_of_part);
    compute_t sum = 0;
    for (int64_t index = part * pieces_of_part + threadIdx.x / team.size(); index < last; index += team.per_block()) {
      sum += rows(team, index);
    }
    sum = Team<kBlockThreads>{}.sum(sum);
    if (threadIdx.x == 0) {
      sums[part] = compute_t(-0.5) * sum;
    }
  }
}

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

// Calls body(operands and gradients) for either call with gradients.
template <typename scalar_t, typename Call, typename Body>
void dispatch_gradient_rows(const Call& call, const Body& body) {
  const auto* mu = static_cast<const scalar_t*>(call.mu);
  const auto* logvar = static_cast<const scalar_t*>(call.logvar);
  const auto* z = static_cast<const scalar_t*>(call.z);
  auto* grad_z = static_cast<scalar_t*>(call.grad_z);
  dispatch_sum<scalar_t>(call.parameters, [&](auto* to, auto summed) {
    const auto all = places(mu, call.rows, 0) | places(logvar, call.rows, 1) | places(z, call.rows, 2) |
                     places(grad_z, call.rows, 4) | places(to) | call.K;
    dispatch_word<kPacket<scalar_t>>(all, [&](auto word) {
      body(GaussianGradientRows<scalar_t, summed, word>{mu, logvar, z, to, grad_z, call.rows, call.K}, summed, word);
    });
  });
}

void compute(const GaussianLogProbBackward& call, Stream stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    dispatch_gradient_rows<scalar_t>(call, [&](const auto& rows, auto summed, auto word) {
      launch_free_rows<scalar_t, word>(
          stream, inner_pieces(call.rows.inner.rows) * call.rows.outer.rows, call.K,
          GaussianLogProbBackwardRows<scalar_t, summed, word>{rows, static_cast<const Compute<scalar_t>*>(call.grad)});
    });
  });
}

void compute(const GaussianLogProbAndGradients& call, Stream stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = Compute<scalar_t>;
    dispatch_gradient_rows<scalar_t>(call, [&](const auto& rows, auto summed, auto word) {
      using Rows = GaussianLogProbAndGradientsRows<scalar_t, summed, word>;
      const Team<> team = {call.K <= 16 * kPacket<scalar_t> ? 3 : 5};
      launch(stream, summed_parts_kernel<Rows>, call.parts(), kBlockThreads,
             Rows{rows, static_cast<const compute_t*>(call.upstream), static_cast<compute_t>(call.scale)},
             static_cast<compute_t*>(call.sums), call.pieces(), call.pieces_of_part(), call.parts(), team);
    });
  });
}

}  // namespace wakesleep::cuda
