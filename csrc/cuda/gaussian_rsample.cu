// z = mu + sigma eps with sigma = e^(logvar/2), log q(z) = -1/2 sum_k [logvar + eps^2 + log 2 pi], and the gradients of
// both, on CUDA. eps is a function of the key and the element's index in z, so the backward pass recomputes the same
// eps.
#include "../densities.h"
#include "../gaussian.h"
#include "../registration.h"
#include "rowwise.cuh"

namespace wakesleep::cuda {
namespace {

template <typename scalar_t, bool with_log_prob>
struct GaussianRsampleRows {
  using compute_t = at::opmath_type<scalar_t>;
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

template <bool with_log_prob>
void draw_rows(const GaussianRsample& call) {
  dispatch_floating(call.op, call.dtype(), [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = at::opmath_type<scalar_t>;
    launch_rows<kDrawPacket<scalar_t>>(
        call.samples * call.rows.rows, call.K,
        GaussianRsampleRows<scalar_t, with_log_prob>{
            call.mu.const_data_ptr<scalar_t>(), call.logvar.const_data_ptr<scalar_t>(),
            call.key.const_data_ptr<int64_t>(), call.z.mutable_data_ptr<scalar_t>(),
            with_log_prob ? call.log_prob.mutable_data_ptr<compute_t>() : nullptr, call.rows, call.K});
  });
}

at::Tensor gaussian_rsample(const at::Tensor& mu,      // [*B, K]
                            const at::Tensor& logvar,  // [*B, K]
                            const at::Tensor& key,     // [2]
                            at::IntArrayRef sample_shape) {
  const c10::cuda::CUDAGuard guard(mu.device());
  const GaussianRsample call("gaussian_rsample", mu, logvar, key, sample_shape, false);
  draw_rows<false>(call);
  return call.z;
}

std::tuple<at::Tensor, at::Tensor> gaussian_rsample_log_prob(const at::Tensor& mu,      // [*B, K]
                                                             const at::Tensor& logvar,  // [*B, K]
                                                             const at::Tensor& key,     // [2]
                                                             at::IntArrayRef sample_shape) {
  const c10::cuda::CUDAGuard guard(mu.device());
  const GaussianRsample call("gaussian_rsample_log_prob", mu, logvar, key, sample_shape, true);
  draw_rows<true>(call);
  return {call.z, call.log_prob};
}

// grad_mu = sum_s grad_z; grad_logvar = 1/2 sum_s (grad_z sigma eps - grad_log_prob).
template <typename scalar_t, bool summed>
struct GaussianRsampleBackwardRows {
  using compute_t = at::opmath_type<scalar_t>;
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

at::Tensor gaussian_rsample_backward(const std::optional<at::Tensor>& grad_z,         // [*S, *B, K]
                                     const std::optional<at::Tensor>& grad_log_prob,  // [*S, *B]
                                     const at::Tensor& mu,                            // [*B, K]
                                     const at::Tensor& logvar,                        // [*B, K]
                                     const at::Tensor& key,                           // [2]
                                     at::IntArrayRef sample_shape) {
  const c10::cuda::CUDAGuard guard(mu.device());
  const GaussianRsampleBackward call(grad_z, grad_log_prob, mu, logvar, key, sample_shape);
  dispatch_floating(call.op, call.dtype(), [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = at::opmath_type<scalar_t>;
    dispatch_sum<scalar_t>(call.grad, [&](auto* to, auto summed) {
      launch_free_rows<kDrawPacket<scalar_t>>(
          inner_pieces(call.samples) * call.rows.rows, call.K,
          GaussianRsampleBackwardRows<scalar_t, summed>{
              call.grad_z.defined() ? call.grad_z.const_data_ptr<scalar_t>() : nullptr,
              call.grad_log_prob.defined() ? call.grad_log_prob.const_data_ptr<compute_t>() : nullptr,
              call.logvar.const_data_ptr<scalar_t>(), call.key.const_data_ptr<int64_t>(), to, call.rows, call.samples,
              call.K});
    });
  });
  return call.grad.total();
}

}  // namespace

WAKESLEEP_KERNELS(CUDA, m) {
  m.impl("gaussian_rsample", gaussian_rsample);
  m.impl("gaussian_rsample_log_prob", gaussian_rsample_log_prob);
  m.impl("gaussian_rsample_backward", gaussian_rsample_backward);
}

}  // namespace wakesleep::cuda
