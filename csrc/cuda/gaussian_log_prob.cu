// log N(z; mu, diag e^logvar) = -1/2 sum_k [logvar + t^2 + log 2 pi], t = (z - mu) e^(-logvar/2), and its gradients,
// on CUDA.
#include "../densities.h"
#include "../gaussian.h"
#include "../registration.h"
#include "rowwise.cuh"

namespace wakesleep::cuda {
namespace {

template <typename scalar_t>
struct GaussianLogProbRows {
  using compute_t = at::opmath_type<scalar_t>;
  const scalar_t* __restrict__ mu;
  const scalar_t* __restrict__ logvar;
  const scalar_t* __restrict__ z;
  compute_t* __restrict__ log_prob;
  RowMap<3> rows;
  int64_t K;

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t row) const {
    const auto offset = rows(row);
    const scalar_t* m = mu + offset.of[0];
    const scalar_t* l = logvar + offset.of[1];
    const scalar_t* v = z + offset.of[2];
    compute_t sum = 0;
    const int past = past_boundary<kPacket<scalar_t>>(v);
    for_spans<kPacket<scalar_t>>(team, K, past, aligned<kPacket<scalar_t>>(K, v, m, l), [&](auto span) {
      const auto v_packet = load<compute_t>(span, v);
      const auto m_packet = load<compute_t>(span, m);
      const auto l_packet = load<compute_t>(span, l);
#pragma unroll
      for (int i = 0; i < span.size; ++i) {
        const GaussianTerm<compute_t> term(m_packet.value[i], l_packet.value[i], v_packet.value[i]);
        sum += l_packet.value[i] + term.standardized * term.standardized;
      }
    });
    sum = team.sum(sum);
    if (team.rank() == 0) {
      log_prob[row] = gaussian_log_prob_of_sum(sum, K);
    }
  }
};

at::Tensor gaussian_log_prob(const at::Tensor& mu,      // [*B, K]
                             const at::Tensor& logvar,  // [*B, K]
                             const at::Tensor& z) {     // [*S, *B, K]
  const c10::cuda::CUDAGuard guard(mu.device());
  const GaussianLogProb call(mu, logvar, z);
  dispatch_floating(call.op, call.dtype(), [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    launch_rows<kPacket<scalar_t>>(
        call.rows.rows, call.K,
        GaussianLogProbRows<scalar_t>{call.mu.const_data_ptr<scalar_t>(), call.logvar.const_data_ptr<scalar_t>(),
                                      call.z.const_data_ptr<scalar_t>(),
                                      call.log_prob.mutable_data_ptr<at::opmath_type<scalar_t>>(), call.rows, call.K});
  });
  return call.log_prob;
}

template <typename scalar_t, bool summed>
struct GaussianLogProbBackwardRows {
  using compute_t = at::opmath_type<scalar_t>;
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
    const bool on_boundaries =
        !summed && aligned<kPacket<scalar_t>>(K, m_row, l_row, z + piece.offset.of[2], grad_z, out);
    for_spans<kPacket<scalar_t>>(team, K, past_boundary<kPacket<scalar_t>>(m_row), on_boundaries, [&](auto span) {
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

std::tuple<at::Tensor, at::Tensor> gaussian_log_prob_backward(const at::Tensor& grad,    // [*S, *B]
                                                              const at::Tensor& mu,      // [*B, K]
                                                              const at::Tensor& logvar,  // [*B, K]
                                                              const at::Tensor& z,       // [*S, *B, K]
                                                              bool with_grad_z) {
  const c10::cuda::CUDAGuard guard(mu.device());
  const GaussianLogProbBackward call(grad, mu, logvar, z, with_grad_z);
  dispatch_floating(call.op, call.dtype(), [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    dispatch_sum<scalar_t>(call.grad_parameters, [&](auto* to, auto summed) {
      launch_free_rows<kPacket<scalar_t>>(
          inner_pieces(call.rows.inner.rows) * call.rows.outer.rows, call.K,
          GaussianLogProbBackwardRows<scalar_t, summed>{
              call.mu.const_data_ptr<scalar_t>(), call.logvar.const_data_ptr<scalar_t>(),
              call.z.const_data_ptr<scalar_t>(), call.grad.const_data_ptr<at::opmath_type<scalar_t>>(), to,
              with_grad_z ? call.grad_z.mutable_data_ptr<scalar_t>() : nullptr, call.rows, call.K});
    });
  });
  return {call.grad_parameters.total(), call.grad_z};
}

}  // namespace

WAKESLEEP_KERNELS(CUDA, m) {
  m.impl("gaussian_log_prob", gaussian_log_prob);
  m.impl("gaussian_log_prob_backward", gaussian_log_prob_backward);
}

}  // namespace wakesleep::cuda
