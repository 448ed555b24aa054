// KL(N(mu, diag e^logvar) || N(0, I)) = 1/2 sum_k [mu^2 + e^logvar - 1 - logvar] and its gradients, on CUDA.
#include "../densities.h"
#include "../gaussian.h"
#include "../registration.h"
#include "rowwise.cuh"

namespace wakesleep::cuda {
namespace {

template <typename scalar_t>
struct GaussianKlRows {
  using compute_t = at::opmath_type<scalar_t>;
  const scalar_t* __restrict__ mu;
  const scalar_t* __restrict__ logvar;
  compute_t* __restrict__ kl;
  RowMap<2> rows;
  int64_t K;

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t row) const {
    const auto offset = rows(row);
    const scalar_t* m = mu + offset.of[0];
    const scalar_t* l = logvar + offset.of[1];
    compute_t sum = 0;
    const int past = past_boundary<kPacket<scalar_t>>(m);
    for_spans<kPacket<scalar_t>>(team, K, past, aligned<kPacket<scalar_t>>(K, m, l), [&](auto span) {
      const auto m_packet = load<compute_t>(span, m);
      const auto l_packet = load<compute_t>(span, l);
#pragma unroll
      for (int i = 0; i < span.size; ++i) {
        sum += twice_gaussian_kl(m_packet.value[i], l_packet.value[i]);
      }
    });
    sum = team.sum(sum);
    if (team.rank() == 0) {
      kl[row] = compute_t(0.5) * sum;
    }
  }
};

at::Tensor gaussian_kl(const at::Tensor& mu,        // [*B, K]
                       const at::Tensor& logvar) {  // [*B, K]
  const c10::cuda::CUDAGuard guard(mu.device());
  const GaussianKl call(mu, logvar);
  dispatch_floating(call.op, call.dtype(), [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    launch_rows<kPacket<scalar_t>>(
        call.rows.rows, call.K,
        GaussianKlRows<scalar_t>{call.mu.const_data_ptr<scalar_t>(), call.logvar.const_data_ptr<scalar_t>(),
                                 call.kl.mutable_data_ptr<at::opmath_type<scalar_t>>(), call.rows, call.K});
  });
  return call.kl;
}

template <typename scalar_t>
struct GaussianKlBackwardRows {
  using compute_t = at::opmath_type<scalar_t>;
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
    const int past = past_boundary<kPacket<scalar_t>>(m);
    for_spans<kPacket<scalar_t>>(team, K, past, aligned<kPacket<scalar_t>>(K, m, l, out), [&](auto span) {
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

at::Tensor gaussian_kl_backward(const at::Tensor& grad,      // [*B]
                                const at::Tensor& mu,        // [*B, K]
                                const at::Tensor& logvar) {  // [*B, K]
  const c10::cuda::CUDAGuard guard(mu.device());
  const GaussianKlBackward call(grad, mu, logvar);
  dispatch_floating(call.op, call.dtype(), [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    launch_free_rows<kPacket<scalar_t>>(
        call.rows.rows, call.K,
        GaussianKlBackwardRows<scalar_t>{call.mu.const_data_ptr<scalar_t>(), call.logvar.const_data_ptr<scalar_t>(),
                                         call.grad.const_data_ptr<at::opmath_type<scalar_t>>(),
                                         call.grad_parameters.mutable_data_ptr<scalar_t>(), call.rows, call.K});
  });
  return call.grad_parameters;
}

}  // namespace

WAKESLEEP_KERNELS(CUDA, m) {
  m.impl("gaussian_kl", gaussian_kl);
  m.impl("gaussian_kl_backward", gaussian_kl_backward);
}

}  // namespace wakesleep::cuda
