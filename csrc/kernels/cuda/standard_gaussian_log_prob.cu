#include "../standard_gaussian_log_prob.h"

#include "../densities.h"
#include "rowwise.cuh"

namespace wakesleep::cuda {
namespace {

template <typename scalar_t, int word>
struct StandardGaussianLogProbRows {
  using compute_t = Compute<scalar_t>;
  const scalar_t* __restrict__ z;
  compute_t* __restrict__ log_prob;
  RowMap<1> rows;
  int64_t K;

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t row) const {
    const compute_t sum =
        sum_over_row<compute_t, word>(team, K, [](compute_t v) { return v * v; }, z + rows(row).of[0]);
    if (team.rank() == 0) {
      log_prob[row] = gaussian_log_prob_of_sum(sum, K);
    }
  }
};

template <typename scalar_t, int word>
struct StandardGaussianLogProbBackwardRows {
  using compute_t = Compute<scalar_t>;
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
    for_words<scalar_t, word, word>(team, K, 0, [&](auto span) {
      auto values = load<compute_t>(span, v);
#pragma unroll
      for (int i = 0; i < span.size; ++i) {
        values.value[i] *= -upstream;
      }
      store(span, values, out);
    });
  }
};

}  // namespace

void compute(const StandardGaussianLogProb& call, Stream stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    const auto* z = static_cast<const scalar_t*>(call.z);
    dispatch_word<kPacket<scalar_t>>(places(z, call.rows, 0) | call.K, [&](auto word) {
      launch_rows_of<scalar_t, word>(stream, call.rows.rows, call.K,
                                     StandardGaussianLogProbRows<scalar_t, word>{
                                         z, static_cast<Compute<scalar_t>*>(call.log_prob), call.rows, call.K});
    });
  });
}

void compute(const StandardGaussianLogProbBackward& call, Stream stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    const auto* z = static_cast<const scalar_t*>(call.z);
    auto* grad_z = static_cast<scalar_t*>(call.grad_z);
    dispatch_word<kPacket<scalar_t>>(places(z, call.rows, 0) | places(grad_z) | call.K, [&](auto word) {
      launch_free_rows<scalar_t, word>(
          stream, call.rows.rows, call.K,
          StandardGaussianLogProbBackwardRows<scalar_t, word>{z, static_cast<const Compute<scalar_t>*>(call.grad),
                                                              grad_z, call.rows, call.K});
    });
  });
}

}  // namespace wakesleep::cuda
