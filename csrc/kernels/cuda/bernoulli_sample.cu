#include "../bernoulli_sample.h"

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

}  // namespace

void compute(const BernoulliSample& call, Stream stream) {
  dispatch_floating_and_written(call.dtype, call.x_dtype, [&](auto logit_type, auto x_type) {
    using logit_t = typename decltype(logit_type)::type;
    using x_t = typename decltype(x_type)::type;
    launch_free_rows<kDrawPacket<logit_t>>(
        stream, call.samples * call.rows.rows, call.D,
        BernoulliSampleRows<logit_t, x_t>{static_cast<const logit_t*>(call.logits), call.key, static_cast<x_t*>(call.x),
                                          call.rows, call.D});
  });
}

}  // namespace wakesleep::cuda
