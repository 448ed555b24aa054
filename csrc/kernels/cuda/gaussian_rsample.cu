#include "../gaussian_rsample.h"

#include "../densities.h"
#include "rowwise.cuh"

namespace wakesleep::cuda {
namespace {

template <typename scalar_t, bool with_log_prob, int word>
struct GaussianRsampleRows {
  using compute_t = Compute<scalar_t>;
  static constexpr int n = kDrawPacket<scalar_t>;
  // Two kinds of rows would spill: float16 with log_prob, and single elements without.
  static constexpr bool spills = with_log_prob ? std::is_same_v<scalar_t, Half> : word == 1;
  static constexpr int kBlocks = spills ? 2 : kBlocksOfSampler<scalar_t>;
  const scalar_t* __restrict__ mu;
  const scalar_t* __restrict__ logvar;
  const int64_t* __restrict__ key;
  scalar_t* __restrict__ z;
  compute_t* __restrict__ log_prob;
  RowMap<2> rows;
  int64_t K;

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t row) const {
    const auto offset = rows(pass_over(rows.rows, row).row);
    const scalar_t* m_row = mu + offset.of[0];
    const scalar_t* l_row = logvar + offset.of[1];
    const int64_t first = row * K;
    const ScheduledKey scheduled = read_key(key);
    compute_t sum = 0;
    for_words<scalar_t, n, word>(team, K, static_cast<int>(uint64_t(first) % n), [&](auto span) {
      auto m = load<compute_t>(span, m_row);
      const auto l = load<compute_t>(span, l_row);
      const auto eps = draw<NormalsFor<scalar_t>, compute_t, n>(scheduled, first + span.column);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        m.value[i] += sigma_for<scalar_t>(l.value[i]) * eps.value[i];
        sum += span.holds(i) ? l.value[i] + eps.value[i] * eps.value[i] : compute_t(0);
      }
      store(span, m, z + first);
    });
    if constexpr (with_log_prob) {
      sum = team.sum(sum);
      if (team.rank() == 0) {
        log_prob[row] = gaussian_log_prob_of_sum(sum, K);
      }
    }
  }
};

template <typename scalar_t, bool summed, int word>
struct GaussianRsampleBackwardRows {
  using compute_t = Compute<scalar_t>;
  static constexpr int n = kDrawPacket<scalar_t>;
  static constexpr int kBlocks = summed ? 2 : kBlocksOfSampler<scalar_t>;
  using grad_t = std::conditional_t<summed, compute_t, scalar_t>;
  const scalar_t* __restrict__ grad_z;          // null if z has no gradient
  const compute_t* __restrict__ grad_log_prob;  // null if log_prob has no gradient
  const scalar_t* __restrict__ logvar;
  const int64_t* __restrict__ key;
  grad_t* __restrict__ grad;
  RowMap<1> rows;
  int64_t samples;
  int64_t K;

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t index) const {
    const RowOfPass place = pass_over(rows.rows, index);
    const int64_t B = rows.rows, row = place.row;
    const int64_t first_sample = summed ? place.pass * kPieceRows : 0;
    const int64_t last_sample = summed ? min(samples, first_sample + kPieceRows) : 1;
    const scalar_t* l_row = logvar + rows(row).of[0];
    const ScheduledKey scheduled = read_key(key);
    compute_t total_log_prob = 0;
    for (int64_t sample = first_sample; grad_log_prob != nullptr && sample < last_sample; ++sample) {
      total_log_prob += grad_log_prob[sample * B + row];
    }
    grad_t* out = grad + index * 2 * K;
    const int64_t first_element = (first_sample * B + row) * K;
    for_words<scalar_t, n, word, summed>(team, K, static_cast<int>(uint64_t(first_element) % n), [&](auto span) {
      Packet<compute_t, n> total_z = {}, total_z_eps = {};
      for (int64_t sample = first_sample; grad_z != nullptr && sample < last_sample; ++sample) {
        const int64_t first = (sample * B + row) * K;
        const auto upstream = load<compute_t>(span, grad_z + first);
        // The row of a later sample may begin in the middle of a Philox block.
        const auto eps = draw<NormalsFor<scalar_t>, compute_t, n, summed>(scheduled, first + span.column);
#pragma unroll
        for (int i = 0; i < n; ++i) {
          total_z.value[i] += upstream.value[i];
          total_z_eps.value[i] += upstream.value[i] * eps.value[i];
        }
      }
      const auto l = load<compute_t>(span, l_row);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        total_z_eps.value[i] =
            compute_t(0.5) * (sigma_for<scalar_t>(l.value[i]) * total_z_eps.value[i] - total_log_prob);
      }
      store(span, total_z, out);
      store(span, total_z_eps, out + K);
    });
  }
};

}  // namespace

void compute(const GaussianRsample& call, Stream stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    constexpr int n = kDrawPacket<scalar_t>;
    const auto* mu = static_cast<const scalar_t*>(call.mu);
    const auto* logvar = static_cast<const scalar_t*>(call.logvar);
    auto* z = static_cast<scalar_t*>(call.z);
    auto* log_prob = static_cast<Compute<scalar_t>*>(call.log_prob);
    if (log_prob == nullptr) {
      launch_draws<scalar_t>(stream, places(mu) | places(logvar) | places(z), call.rows, call.samples, call.K,
                             [&](auto word, const RowMap<2>& rows, int64_t K) {
                               return GaussianRsampleRows<scalar_t, false, word>{mu,       logvar, call.key, z,
                                                                                 log_prob, rows,   K};
                             });
    } else {
      const auto all = places(mu, call.rows, 0) | places(logvar, call.rows, 1) | places(z) | call.K;
      dispatch_word<n>(all, [&](auto word) {
        launch_rows_of<scalar_t, n>(
            stream, call.samples * call.rows.rows, call.K,
            GaussianRsampleRows<scalar_t, true, word>{mu, logvar, call.key, z, log_prob, call.rows, call.K});
      });
    }
  });
}

void compute(const GaussianRsampleBackward& call, Stream stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    constexpr int n = kDrawPacket<scalar_t>;
    const auto* grad_z = static_cast<const scalar_t*>(call.grad_z);
    const auto* logvar = static_cast<const scalar_t*>(call.logvar);
    dispatch_sum<scalar_t>(call.parameters, [&](auto* to, auto summed) {
      dispatch_word<n>(places(grad_z) | places(logvar, call.rows, 0) | places(to) | call.K, [&](auto word) {
        launch_free_rows<scalar_t, n>(stream, inner_pieces(call.samples) * call.rows.rows, call.K,
                                      GaussianRsampleBackwardRows<scalar_t, summed, word>{
                                          grad_z, static_cast<const Compute<scalar_t>*>(call.grad_log_prob), logvar,
                                          call.key, to, call.rows, call.samples, call.K});
      });
    });
  });
}

}  // namespace wakesleep::cuda
