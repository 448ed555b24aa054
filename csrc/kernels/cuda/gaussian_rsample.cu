#include "../gaussian_rsample.h"

#include "../densities.h"
#include "rowwise.cuh"

namespace wakesleep::cuda {
namespace {

template <typename scalar_t, bool with_log_prob>
struct GaussianRsampleRows {
  using compute_t = Compute<scalar_t>;
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
    const int past = static_cast<int>(uint64_t(first) % kDrawPacket<scalar_t>);
    const bool on_boundaries = past == 0 && aligned<kDrawPacket<scalar_t>>(K, m_row, l_row, z);
    const PhiloxKey key_words = read_key(key);
    compute_t sum = 0;
    for_spans<kDrawPacket<scalar_t>>(team, K, past, on_boundaries, [&](auto span) {
      auto m = load<compute_t>(span, m_row);
      const auto l = load<compute_t>(span, l_row);
      const auto eps = draw<StandardNormals, compute_t, span.size>(key_words, first + span.column);
#pragma unroll
      for (int i = 0; i < span.size; ++i) {
        m.value[i] += gaussian_sigma(l.value[i]) * eps.value[i];
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

template <typename scalar_t, bool summed>
struct GaussianRsampleBackwardRows {
  using compute_t = Compute<scalar_t>;
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
    const PhiloxKey key_words = read_key(key);
    compute_t total_log_prob = 0;
    for (int64_t sample = first_sample; grad_log_prob != nullptr && sample < last_sample; ++sample) {
      total_log_prob += grad_log_prob[sample * B + row];
    }
    grad_t* out = grad + index * 2 * K;
    const int64_t first_element = (first_sample * B + row) * K;
    const int past = static_cast<int>(uint64_t(first_element) % kDrawPacket<scalar_t>);
    const bool on_boundaries = !summed && past == 0 && aligned<kDrawPacket<scalar_t>>(K, grad_z, l_row, out);
    for_spans<kDrawPacket<scalar_t>>(team, K, past, on_boundaries, [&](auto span) {
      Packet<compute_t, span.size> total_z = {}, total_z_eps = {};
      for (int64_t sample = first_sample; grad_z != nullptr && sample < last_sample; ++sample) {
        const int64_t first = (sample * B + row) * K;
        const auto upstream = load<compute_t>(span, grad_z + first);
        // The row of a later sample may begin in the middle of a Philox block.
        const auto eps = draw<StandardNormals, compute_t, span.size, summed>(key_words, first + span.column);
#pragma unroll
        for (int i = 0; i < span.size; ++i) {
          total_z.value[i] += upstream.value[i];
          total_z_eps.value[i] += upstream.value[i] * eps.value[i];
        }
      }
      const auto l = load<compute_t>(span, l_row);
#pragma unroll
      for (int i = 0; i < span.size; ++i) {
        total_z_eps.value[i] = compute_t(0.5) * (gaussian_sigma(l.value[i]) * total_z_eps.value[i] - total_log_prob);
      }
      store(span, total_z, out);
      store(span, total_z_eps, out + K);
    });
  }
};

template <bool with_log_prob>
void draw_rows(const GaussianRsample& call, Stream stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    launch_rows<kDrawPacket<scalar_t>>(
        stream, call.samples * call.rows.rows, call.K,
        GaussianRsampleRows<scalar_t, with_log_prob>{
            static_cast<const scalar_t*>(call.mu), static_cast<const scalar_t*>(call.logvar), call.key,
            static_cast<scalar_t*>(call.z), static_cast<Compute<scalar_t>*>(call.log_prob), call.rows, call.K});
  });
}

}  // namespace

void compute(const GaussianRsample& call, Stream stream) {
  call.log_prob == nullptr ? draw_rows<false>(call, stream) : draw_rows<true>(call, stream);
}

void compute(const GaussianRsampleBackward& call, Stream stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    dispatch_sum<scalar_t>(call.parameters, [&](auto* to, auto summed) {
      launch_free_rows<kDrawPacket<scalar_t>>(
          stream, inner_pieces(call.samples) * call.rows.rows, call.K,
          GaussianRsampleBackwardRows<scalar_t, summed>{
              static_cast<const scalar_t*>(call.grad_z), static_cast<const Compute<scalar_t>*>(call.grad_log_prob),
              static_cast<const scalar_t*>(call.logvar), call.key, to, call.rows, call.samples, call.K});
    });
  });
}

}  // namespace wakesleep::cuda
