// x ~ Bernoulli(s(logits)): x = [u <= s(a)] for a uniform u in (0, 1], on CUDA.
#include "../bernoulli.h"
#include "../registration.h"
#include "bernoulli_rows.cuh"

namespace wakesleep::cuda {
namespace {

template <typename logit_t, typename x_t>
struct BernoulliSampleRows {
  const logit_t* __restrict__ logits;
  const int64_t* __restrict__ key;
  x_t* __restrict__ x;
  RowMap<1> rows;
  int64_t D;

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t row) const {
    const StoredLogits<logit_t> a = {logits + rows(pass_over(rows.rows, row).row).of[0]};
    draw_row<kDrawPacket<logit_t>>(team, read_key(key), row * D, D, OfLogit{}, a, x + row * D);
  }
};

at::Tensor bernoulli_sample(const at::Tensor& logits,  // [*B, D]
                            const at::Tensor& key,     // [2]
                            at::IntArrayRef sample_shape, std::optional<at::ScalarType> dtype) {
  const c10::cuda::CUDAGuard guard(logits.device());
  const BernoulliSample call(logits, key, sample_shape, dtype);
  call.dispatch([&](auto logit_type, auto x_type) {
    using logit_t = typename decltype(logit_type)::type;
    using x_t = typename decltype(x_type)::type;
    launch_free_rows<kDrawPacket<logit_t>>(
        call.samples * call.rows.rows, call.D,
        BernoulliSampleRows<logit_t, x_t>{call.logits.const_data_ptr<logit_t>(), call.key.const_data_ptr<int64_t>(),
                                          call.x.mutable_data_ptr<x_t>(), call.rows, call.D});
  });
  return call.result();
}

}  // namespace

WAKESLEEP_KERNELS(CUDA, m) { m.impl("bernoulli_sample", bernoulli_sample); }

}  // namespace wakesleep::cuda
