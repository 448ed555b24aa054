// x ~ Bernoulli(s(logits)): x = [u <= s(a)] for a uniform u in (0, 1], on the CPU.
#include "../bernoulli.h"
#include "../registration.h"
#include "bernoulli_rows.h"

namespace wakesleep::cpu {
namespace {

at::Tensor bernoulli_sample(const at::Tensor& logits,  // [*B, D]
                            const at::Tensor& key,     // [2]
                            at::IntArrayRef sample_shape, std::optional<at::ScalarType> dtype) {
  const BernoulliSample call(logits, key, sample_shape, dtype);
  call.dispatch([&](auto logit_type, auto x_type) {
    using logit_t = typename decltype(logit_type)::type;
    using x_t = typename decltype(x_type)::type;
    using compute_t = at::opmath_type<logit_t>;
    const auto* logits_data = call.logits.const_data_ptr<logit_t>();
    auto* x_data = call.x.mutable_data_ptr<x_t>();
    const auto logits_of = [&](int64_t row) {
      return StoredLogits<logit_t>{logits_data + call.rows(row % call.rows.rows).of[0]};
    };
    draw_rows<compute_t>(read_key(call.key), 0, call.samples * call.rows.rows, call.D, OfLogit{}, logits_of, x_data);
  });
  return call.result();
}

}  // namespace

WAKESLEEP_KERNELS(CPU, m) { m.impl("bernoulli_sample", bernoulli_sample); }

}  // namespace wakesleep::cpu
