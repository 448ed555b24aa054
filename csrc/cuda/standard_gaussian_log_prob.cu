// log N(z; 0, I) = -1/2 sum_k [z^2 + log 2 pi] and its gradient, -z, on CUDA.
#include "../densities.h"
#include "../gaussian.h"
#include "../registration.h"
#include "rowwise.cuh"

namespace wakesleep::cuda {
namespace {

template <typename scalar_t>
struct StandardGaussianLogProbRows {
  using compute_t = at::opmath_type<scalar_t>;
  const scalar_t* __restrict__ z;
  compute_t* __restrict__ log_prob;
  RowMap<1> rows;
  int64_t K;

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t row) const {
    const scalar_t* v = z + rows(row).of[0];
    compute_t sum = 0;
    const int past = past_boundary<kPacket<scalar_t>>(v);
    for_spans<kPacket<scalar_t>>(team, K, past, aligned<kPacket<scalar_t>>(K, v), [&](auto span) {
      const auto z_packet = load<compute_t>(span, v);
#pragma unroll
      for (int i = 0; i < span.size; ++i) {
        sum += z_packet.value[i] * z_packet.value[i];
      }
    });
    sum = team.sum(sum);
    if (team.rank() == 0) {
      log_prob[row] = gaussian_log_prob_of_sum(sum, K);
    }
  }
};

at::Tensor standard_gaussian_log_prob(const at::Tensor& z) {  // [*B, K]
  const c10::cuda::CUDAGuard guard(z.device());
  const StandardGaussianLogProb call(z);
  dispatch_floating(call.op, call.z.scalar_type(), [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    launch_rows<kPacket<scalar_t>>(call.rows.rows, call.K,
                                   StandardGaussianLogProbRows<scalar_t>{
                                       call.z.const_data_ptr<scalar_t>(),
                                       call.log_prob.mutable_data_ptr<at::opmath_type<scalar_t>>(), call.rows, call.K});
  });
  return call.log_prob;
}

template <typename scalar_t>
struct StandardGaussianLogProbBackwardRows {
  using compute_t = at::opmath_type<scalar_t>;
  const scalar_t* __restrict__ z;
  const compute_t* __restrict__ grad;
  scalar_t* __restrict__ grad_z;
  RowMap<2> rows;
  int64_t K;

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t row) const {
    const auto offset = rows(row);
    const scalar_t* v = z + offset.of[0];
    const compute_t upstream = grad[offset.of[1]];
    scalar_t* out = grad_z + row * K;
    const int past = past_boundary<kPacket<scalar_t>>(v);
    for_spans<kPacket<scalar_t>>(team, K, past, aligned<kPacket<scalar_t>>(K, v, out), [&](auto span) {
      auto values = load<compute_t>(span, v);
#pragma unroll
      for (int i = 0; i < span.size; ++i) {
        values.value[i] *= -upstream;
      }
      store(span, values, out);
    });
  }
};

at::Tensor standard_gaussian_log_prob_backward(const at::Tensor& grad,  // [*B]
                                               const at::Tensor& z) {   // [*B, K]
  const c10::cuda::CUDAGuard guard(z.device());
  const StandardGaussianLogProbBackward call(grad, z);
  dispatch_floating(call.op, call.z.scalar_type(), [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    launch_free_rows<kPacket<scalar_t>>(
        call.rows.rows, call.K,
        StandardGaussianLogProbBackwardRows<scalar_t>{call.z.const_data_ptr<scalar_t>(),
                                                      call.grad.const_data_ptr<at::opmath_type<scalar_t>>(),
                                                      call.grad_z.mutable_data_ptr<scalar_t>(), call.rows, call.K});
  });
  return call.grad_z;
}

}  // namespace

WAKESLEEP_KERNELS(CUDA, m) {
  m.impl("standard_gaussian_log_prob", standard_gaussian_log_prob);
  m.impl("standard_gaussian_log_prob_backward", standard_gaussian_log_prob_backward);
}

}  // namespace wakesleep::cuda
