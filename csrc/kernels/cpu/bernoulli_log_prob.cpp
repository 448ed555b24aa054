#include "../bernoulli_log_prob.h"

#include "bernoulli_rows.h"

namespace wakesleep::cpu {

void compute(const BernoulliLogProb& call, Stream) {
  dispatch_floating_and_value(call.dtype, call.x_dtype, [&](auto logit_type, auto x_type) {
    using logit_t = typename decltype(logit_type)::type;
    using x_t = typename decltype(x_type)::type;
    using compute_t = Compute<logit_t>;
    const auto* logits = static_cast<const logit_t*>(call.logits);
    const auto* x = static_cast<const x_t*>(call.x);
    auto* log_prob = static_cast<compute_t*>(call.log_prob);
    vectorized_parallel_for(call.rows.rows, grain_rows(call.D), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const auto offset = call.rows(row);
        log_prob[row] = row_log_prob<compute_t>(call.D, StoredLogits<logit_t>{logits + offset.of[0]}, x + offset.of[1]);
      }
    });
  });
}

void compute(const BernoulliLogProbBackward& call, Stream) {
  dispatch_floating_and_value(call.dtype, call.x_dtype, [&](auto logit_type, auto x_type) {
    using logit_t = typename decltype(logit_type)::type;
    using x_t = typename decltype(x_type)::type;
    using compute_t = Compute<logit_t>;
    const auto* logits = static_cast<const logit_t*>(call.logits);
    const auto* x = static_cast<const x_t*>(call.x);
    const auto* grad = static_cast<const compute_t*>(call.grad);
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
          const compute_t* a = logits_tile.read(logits + offset.of[0] + column, columns);
          const compute_t* v = x_tile.read(x + offset.of[1] + column, columns);
          const compute_t upstream = grad[offset.of[2]];
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
}

}  // namespace wakesleep::cpu
