#include "../linear_bernoulli_log_prob.h"

#include "bernoulli_rows.h"
#include "summed_rows.h"

namespace wakesleep::cpu {

void compute(const LinearBernoulliLogProb& call, Stream) {
  dispatch_computed_and_value(call.dtype, call.x_dtype, [&](auto type, auto x_type) {
    using compute_t = typename decltype(type)::type;
    using x_t = typename decltype(x_type)::type;
    const auto* products = static_cast<const compute_t*>(call.products);
    const auto* bias = static_cast<const compute_t*>(call.bias);
    const auto* x = static_cast<const x_t*>(call.x);
    auto* log_prob = static_cast<compute_t*>(call.log_prob);
    vectorized_parallel_for(call.count, grain_rows(call.D), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const ProductAndBias<compute_t> logits = {products + row * call.products_stride, bias};
        log_prob[row] = row_log_prob<compute_t>(call.D, logits, x + call.rows(call.first + row).of[0]);
      }
    });
  });
}

namespace {

template <bool with_terms, typename compute_t, typename x_t>
void write_gradient(const LinearBernoulliGradient& call) {
  const auto* products = static_cast<const compute_t*>(call.products);
  const auto* bias = static_cast<const compute_t*>(call.bias);
  const auto* x_data = static_cast<const x_t*>(call.x);
  const auto* upstream = static_cast<const compute_t*>(call.upstream);
  auto* log_prob = static_cast<compute_t*>(call.log_prob);
  auto* terms = static_cast<compute_t*>(call.terms);
  const auto scale = static_cast<compute_t>(call.scale);
  auto* grad_data = static_cast<compute_t*>(call.grad_logits);
  const int64_t D = call.D;
  for_summed_rows(call.count, D, static_cast<compute_t*>(call.sums), [&](int64_t row, compute_t* sum) {
    const auto offset = call.rows(call.first + row);
    const ProductAndBias<compute_t> logits = {products + row * call.products_stride, bias};
    const auto* x = x_data + offset.of[0];
    const compute_t weight = upstream != nullptr ? scale * upstream[offset.of[1]] : scale;
    auto* grad = grad_data + row * call.grad_stride;
    const auto write = [&](auto element, compute_t a, compute_t v) {
      const compute_t gradient = weight * bernoulli_grad_logits(a, v);
      element.store(grad, gradient);
      element.add(sum, gradient);
    };
    if constexpr (with_terms) {
      const compute_t sum = row_log_prob<compute_t>(D, logits, x, write);
      terms[row] = weight * sum;
      if (log_prob != nullptr) {
        log_prob[row] = sum;
      }
    } else {
      for_tiles(D, [&](int64_t column, int64_t columns) {
        Tile<compute_t> logits_tile, x_tile;
        for_lanes<compute_t>(
            columns, [&](auto element, compute_t a, compute_t v) { write(element.after(column), a, v); },
            logits(logits_tile, column, columns), x_tile.read(x + column, columns));
      });
    }
  });
}

}  // namespace

void compute(const LinearBernoulliGradient& call, Stream) {
  dispatch_computed_and_value(call.dtype, call.x_dtype, [&](auto type, auto x_type) {
    using compute_t = typename decltype(type)::type;
    using x_t = typename decltype(x_type)::type;
    call.terms != nullptr ? write_gradient<true, compute_t, x_t>(call) : write_gradient<false, compute_t, x_t>(call);
  });
}

}  // namespace wakesleep::cpu
