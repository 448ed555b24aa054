#include "../bernoulli_log_prob.h"

#include "bernoulli_rows.cuh"

namespace wakesleep::cuda {
namespace {

template <typename logit_t, typename x_t>
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
    const StoredLogits<logit_t> a = {logits + offset.of[0]};
    write_log_prob<kPacket<logit_t>>(team, D, past_boundary<kPacket<logit_t>>(a.row), a, x + offset.of[1],
                                     log_prob + row);
  }
};

template <typename logit_t, typename x_t, bool summed>
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
    const int past = past_boundary<kPacket<logit_t>>(logits + piece.offset.of[0]);
    const bool on_boundaries =
        !summed && aligned<kPacket<logit_t>>(D, logits + piece.offset.of[0], x + piece.offset.of[1], out);
    for_spans<kPacket<logit_t>>(team, D, past, on_boundaries, [&](auto span) {
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
    launch_rows<kPacket<logit_t>>(
        stream, call.rows.rows, call.D,
        BernoulliLogProbRows<logit_t, x_t>{static_cast<const logit_t*>(call.logits), static_cast<const x_t*>(call.x),
                                           static_cast<Compute<logit_t>*>(call.log_prob), call.rows, call.D});
  });
}

void compute(const BernoulliLogProbBackward& call, Stream stream) {
  dispatch_floating_and_value(call.dtype, call.x_dtype, [&](auto logit_type, auto x_type) {
    using logit_t = typename decltype(logit_type)::type;
    using x_t = typename decltype(x_type)::type;
    dispatch_sum<logit_t>(call.grad_logits, [&](auto* to, auto summed) {
      launch_free_rows<kPacket<logit_t>>(stream, inner_pieces(call.rows.inner.rows) * call.rows.outer.rows, call.D,
                                         BernoulliLogProbBackwardRows<logit_t, x_t, summed>{
                                             static_cast<const logit_t*>(call.logits), static_cast<const x_t*>(call.x),
                                             static_cast<const Compute<logit_t>*>(call.grad), to, call.rows, call.D});
    });
  });
}

}  // namespace wakesleep::cuda
