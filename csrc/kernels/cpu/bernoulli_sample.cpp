#include "../bernoulli_sample.h"

#include "bernoulli_rows.h"

namespace wakesleep::cpu {

void compute(const BernoulliSample& call, Stream) {
  dispatch_floating_and_written(call.dtype, call.x_dtype, [&](auto logit_type, auto x_type) {
    using logit_t = typename decltype(logit_type)::type;
    using x_t = typename decltype(x_type)::type;
    using compute_t = Compute<logit_t>;
    const auto* logits = static_cast<const logit_t*>(call.logits);
    const auto logits_of = [&](int64_t row) {
      return StoredLogits<logit_t>{logits + call.rows(row % call.rows.rows).of[0]};
    };
    draw_rows<compute_t>(read_key(call.key), 0, call.samples * call.rows.rows, call.D, OfLogit{}, logits_of,
                         static_cast<x_t*>(call.x));
  });
}

}  // namespace wakesleep::cpu
