#include "../bernoulli_log_prob.h"

#include "bernoulli_rows.cuh"

namespace wakesleep::cuda {
namespace {

template <typename logit_t, typename x_t, int word>
struct BernoulliLogProbRows {
  using compute_t = Compute<logit_t>;
  const logit_t* __restrict__ logits;
  const x_t* __restrict__ x;
  compute_t* __restrict__ log_prob;
  RowMap<2> rows;
  int64_t D;

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t row) const {
    const auto offset = rows(row);
    write_log_prob_of_words<logit_t, word>(team, D, logits + offset.of[0], x + offset.of[1], log_prob + row);
  }
};

template <typename logit_t, typename x_t, bool summed, int word>
struct BernoulliLogProbBackwardRows {
  using compute_t = Compute<logit_t>;
  using grad_t = std::conditional_t<summed, compute_t, logit_t>;
  const logit_t* __restrict__ logits;
  const x_t* __restrict__ x;
  const compute_t* __restrict__ grad;
  grad_t* __restrict__ grad_logits;
  RowGroups<3> rows;
  int64_t D;

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t index) const {
    const auto piece = inner_piece(rows, index);
    grad_t* out = grad_logits + index * D;
    for_words<logit_t, word, word, summed>(team, D, 0, [&](auto span) {
      Packet<compute_t, span.size> total = {};
      for_inner_rows<summed>(rows, piece, [&](const auto& offset) {
        const auto a = load<compute_t>(span, logits + offset.of[0]);
        const auto v = load<compute_t>(span, x + offset.of[1]);
        const compute_t upstream = grad[offset.of[2]];
#pragma unroll
        for (int i = 0; i < span.size; ++i) {
          total.value[i] += upstream * bernoulli_grad_logits(a.value[i], v.value[i]);
        }
      });
      store(span, total, out);
    });
  }
};

}  // namespace

void compute(const BernoulliLogProb& call, Stream stream) {
  dispatch_floating_and_value(call.dtype, call.x_dtype, [&](auto logit_type, auto x_type) {
    using logit_t = typename decltype(logit_type)::type;
    using x_t = typename decltype(x_type)::type;
    const auto* logits = static_cast<const logit_t*>(call.logits);
    const auto* x = static_cast<const x_t*>(call.x);
    dispatch_word<kPacket<logit_t>>(places(logits, call.rows, 0) | places(x, call.rows, 1) | call.D, [&](auto word) {
      launch_rows_of<logit_t, word>(stream, call.rows.rows, call.D,
                                    BernoulliLogProbRows<logit_t, x_t, word>{
                                        logits, x, static_cast<Compute<logit_t>*>(call.log_prob), call.rows, call.D});
    });
  });
}

void compute(const BernoulliLogProbBackward& call, Stream stream) {
  dispatch_floating_and_value(call.dtype, call.x_dtype, [&](auto logit_type, auto x_type) {
    using logit_t = typename decltype(logit_type)::type;
    using x_t = typename decltype(x_type)::type;
    const auto* logits = static_cast<const logit_t*>(call.logits);
    const auto* x = static_cast<const x_t*>(call.x);
    dispatch_sum<logit_t>(call.grad_logits, [&](auto* to, auto summed) {
      const auto all = places(logits, call.rows, 0) | places(x, call.rows, 1) | places(to) | call.D;
      dispatch_word<kPacket<logit_t>>(all, [&](auto word) {
        launch_free_rows<logit_t, word>(
            stream, inner_pieces(call.rows.inner.rows) * call.rows.outer.rows, call.D,
            BernoulliLogProbBackwardRows<logit_t, x_t, summed, word>{
                logits, x, static_cast<const Compute<logit_t>*>(call.grad), to, call.rows, call.D});
      });
    });
  });
}

}  // namespace wakesleep::cuda
