// log p(x; logits) = sum_d [x a - softplus(a)] and its gradient with respect to the logits, x - s(a), on the CPU.
#include "../bernoulli.h"
#include "../registration.h"
#include "bernoulli_rows.h"

namespace wakesleep::cpu {
namespace {

at::Tensor bernoulli_log_prob(const at::Tensor& logits,  // [*S, *B, D]
                              const at::Tensor& x) {     // [*B, D]
  const BernoulliLogProb call(logits, x);
  call.dispatch(call.op, [&](auto logit_type, auto x_type) {
    using logit_t = typename decltype(logit_type)::type;
    using x_t = typename decltype(x_type)::type;
    using compute_t = at::opmath_type<logit_t>;
    const auto* logits_data = call.logits.const_data_ptr<logit_t>();
    const auto* x_data = call.x.const_data_ptr<x_t>();
    auto* log_prob = call.log_prob.mutable_data_ptr<compute_t>();
    vectorized_parallel_for(call.rows.rows, grain_rows(call.D), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const auto offset = call.rows(row);
        log_prob[row] =
            row_log_prob<compute_t>(call.D, StoredLogits<logit_t>{logits_data + offset.of[0]}, x_data + offset.of[1]);
      }
    });
  });
  return call.log_prob;
}

at::Tensor bernoulli_log_prob_backward(const at::Tensor& grad,    // [*S, *B]
                                       const at::Tensor& logits,  // [*S, *B, D]
                                       const at::Tensor& x) {     // [*B, D]
  const BernoulliLogProbBackward call(grad, logits, x);
  call.dispatch(call.op, [&](auto logit_type, auto x_type) {
    using logit_t = typename decltype(logit_type)::type;
    using x_t = typename decltype(x_type)::type;
    using compute_t = at::opmath_type<logit_t>;
    const auto* logits_data = call.logits.const_data_ptr<logit_t>();
    const auto* x_data = call.x.const_data_ptr<x_t>();
    const auto* grad_data = call.grad.const_data_ptr<compute_t>();
    dispatch_sum<logit_t>(call.grad_logits, [&](auto* to, auto summed) {
      for_inner_pieces(call.rows, call.D, [&](const auto& piece, int64_t index, int64_t column, int64_t columns) {
        auto* out = to + index * call.D + column;
        Tile<compute_t> result_tile;
        compute_t* result = result_tile.place_for(out);
        if constexpr (summed) {
          std::fill_n(result, columns, compute_t(0));
        }
        for_inner_rows<summed>(call.rows, piece, [&](const auto& offset) {
          Tile<compute_t> logits_tile, x_tile;
          const compute_t* a = logits_tile.read(logits_data + offset.of[0] + column, columns);
          const compute_t* v = x_tile.read(x_data + offset.of[1] + column, columns);
          const compute_t upstream = grad_data[offset.of[2]];
          for_lanes<compute_t>(
              columns,
              [&](auto element, compute_t logit, compute_t value) {
                element.template put<summed>(result, upstream * bernoulli_grad_logits(logit, value));
              },
              a, v);
        });
        result_tile.store(out, columns);
      });
    });
  });
  return call.grad_logits.total();
}

}  // namespace

WAKESLEEP_KERNELS(CPU, m) {
  m.impl("bernoulli_log_prob", bernoulli_log_prob);
  m.impl("bernoulli_log_prob_backward", bernoulli_log_prob_backward);
}

}  // namespace wakesleep::cpu
