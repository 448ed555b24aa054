// x ~ Bernoulli(s(logits)): x = [u <= s(a)] for a uniform u in (0, 1], on CUDA.
#include <torch/library.h>

#include "../bernoulli.h"
#include "../densities.h"
#include "rowwise.cuh"

namespace wakesleep::cuda {
namespace {

template <typename logit_t, typename x_t>
struct BernoulliSampleRows {
  using compute_t = at::opmath_type<logit_t>;
  const logit_t* __restrict__ logits;
  const int64_t* __restrict__ key;
  x_t* __restrict__ x;
  RowMap<1> rows;
  int64_t D;

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t row) const {
    const logit_t* a = logits + rows(row % rows.rows).of[0];
    const int64_t first = row * D;
    const PhiloxKey key_words = read_key(key);
    for_spans<kDrawPacket<logit_t>>(team, D, first % kDrawPacket<logit_t>, [&](auto span) {
      auto values = load<compute_t>(span, a);
      const auto u = draw<Uniforms, compute_t, span.size>(key_words, first + span.column);
#pragma unroll
      for (int i = 0; i < span.size; ++i) {
        values.value[i] = u.value[i] <= sigmoid(values.value[i]) ? 1 : 0;
      }
      store(span, values, x + first);
    });
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
    launch_rows(
        call.samples * call.rows.rows, call.D,
        BernoulliSampleRows<logit_t, x_t>{call.logits.const_data_ptr<logit_t>(), call.key.const_data_ptr<int64_t>(),
                                          call.x.mutable_data_ptr<x_t>(), call.rows, call.D});
  });
  return call.result();
}

}  // namespace

TORCH_LIBRARY_IMPL(wakesleep_ext, CUDA, m) { m.impl("bernoulli_sample", bernoulli_sample); }

}  // namespace wakesleep::cuda
