#include "../bernoulli_sample.h"

#include "bernoulli_rows.cuh"

namespace wakesleep::cuda {
namespace {

template <typename logit_t, typename x_t, int word>
struct BernoulliSampleRows {
  // Half types in words of 8 bytes would spill.
  static constexpr int kBlocks = sizeof(logit_t) == 2 && word == 4 ? 2 : kBlocksOfSampler<logit_t>;
  const logit_t* __restrict__ logits;
  const int64_t* __restrict__ key;
  x_t* __restrict__ x;
  RowMap<1> rows;
  int64_t D;

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t row) const {
    const StoredLogits<logit_t> a = {logits + rows(pass_over(rows.rows, row).row).of[0]};
    draw_row<logit_t, word>(team, read_key(key), row * D, D, OfLogit{}, a, x + row * D);
  }
};

}  // namespace

void compute(const BernoulliSample& call, Stream stream) {
  dispatch_floating_and_written(call.dtype, call.x_dtype, [&](auto logit_type, auto x_type) {
    using logit_t = typename decltype(logit_type)::type;
    using x_t = typename decltype(x_type)::type;
    const auto* logits = static_cast<const logit_t*>(call.logits);
    auto* x = static_cast<x_t*>(call.x);
    launch_draws<logit_t>(stream, places(logits) | places(x), call.rows, call.samples, call.D,
                          [&](auto word, const RowMap<1>& rows, int64_t D) {
                            return BernoulliSampleRows<logit_t, x_t, word>{logits, call.key, x, rows, D};
                          });
  });
}

}  // namespace wakesleep::cuda
