// log p(x; logits) = sum_d [x a - softplus(a)] and its gradient with respect to the logits, x - s(a).
#include "bernoulli.h"
#include "register.h"

namespace wakesleep {
namespace {

// The checked operands of the log-likelihood and of its gradient.
struct BernoulliOperands {
  at::Tensor logits;    // [*S, *B, D]
  at::Tensor x;         // [*B, D]
  at::DimVector batch;  // broadcast shape of the leading dimensions
  int64_t D;

  BernoulliOperands(const char* op, const at::Tensor& logits_in, const at::Tensor& x_in) {
    check_floating(op, {"logits", logits_in});
    check_same_event(op, {"logits", logits_in}, {"x", x_in});
    logits = with_contiguous_events(logits_in);
    x = observation(op, x_in, logits.scalar_type());
    batch = broadcast_batch(op, {"logits", logits}, {"x", x});
    D = logits.size(-1);
  }
};

at::Tensor bernoulli_log_prob(const at::Tensor& logits,  // [*S, *B, D]
                              const at::Tensor& x) {     // [*B, D]
  const BernoulliOperands of("bernoulli_log_prob", logits, x);
  const at::Tensor log_prob =
      at::empty(of.batch, of.logits.options().dtype(compute_dtype(of.logits.scalar_type())));  // [*S, *B]
  const auto rows = map_rows<2>(of.batch, {row_strides(of.logits, of.batch), row_strides(of.x, of.batch)});
  compute(log_prob.device(), BernoulliLogProb{dtype_of(of.logits), dtype_of(of.x), read(of.logits), read(of.x),
                                              write(log_prob), rows, of.D});
  return log_prob;
}

at::Tensor bernoulli_log_prob_backward(const at::Tensor& grad_in,  // [*S, *B]
                                       const at::Tensor& logits,   // [*S, *B, D]
                                       const at::Tensor& x) {      // [*B, D]
  constexpr auto op = "bernoulli_log_prob_backward";
  const BernoulliOperands of(op, logits, x);
  const at::Tensor grad = check_row_gradient(op, "grad", grad_in, of.batch, {"logits", of.logits});
  const auto rows =
      group_rows<3>(of.batch, batch_sizes(of.logits),
                    {row_strides(of.logits, of.batch), row_strides(of.x, of.batch), row_strides(grad, of.batch, 0)});
  const GradientSum grad_logits(of.logits, of.logits.sizes(), rows.inner.rows);
  compute(grad.device(), BernoulliLogProbBackward{dtype_of(of.logits), dtype_of(of.x), read(of.logits), read(of.x),
                                                  read(grad), grad_logits.rows(), rows, of.D});
  return grad_logits.total();
}

}  // namespace

WAKESLEEP_OPS(m) {
  m.impl("bernoulli_log_prob", bernoulli_log_prob);
  m.impl("bernoulli_log_prob_backward", bernoulli_log_prob_backward);
}

}  // namespace wakesleep
