#include "../linear_bernoulli_sample.h"

#include "bernoulli_rows.h"

namespace wakesleep::cpu {

void compute(const LinearBernoulliSample& call, Stream) {
  dispatch_floating_and_written(call.dtype, call.x_dtype, [&](auto type, auto x_type) {
    using compute_t = Compute<typename decltype(type)::type>;
    using x_t = typename decltype(x_type)::type;
    const auto* products = static_cast<const compute_t*>(call.products);
    const auto* bias = static_cast<const compute_t*>(call.bias);
    const auto logits_of = [&](int64_t row) {
      return ProductAndBias<compute_t>{products + row * call.products_stride, bias};
    };
    draw_rows<compute_t>(read_key(call.key), call.first, call.count, call.D, OfLogit{}, logits_of,
                         static_cast<x_t*>(call.x));
  });
}

}  // namespace wakesleep::cpu
