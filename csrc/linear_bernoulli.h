// Bernoulli heads, whose logits are the output of a linear layer. This file has the checked operands of a call, and the
// ops that run a backend's kernels. If the logits are not kept, they are computed in chunks small enough to stay in
// cache.
#pragma once

#include <limits>

#include "bernoulli.h"
#include "linear.h"
#include "registration.h"

namespace wakesleep {

// By default, logits that take at most kept_bytes() are kept for the backward pass, and larger logits are recomputed.
// The caller can override this.
constexpr int64_t kKeepNone = -1, kKeepAll = std::numeric_limits<int64_t>::max();
inline int64_t kept_bytes(at::Device device) { return device.is_cuda() ? 16 * kMiB : 4 * kMiB; }

// The operands of a Bernoulli head and an observation x.
struct LinearBernoulliOperands : Linear {
  at::DimVector batch;  // broadcast shape of the leading dimensions of h and x
  int64_t N;            // number of rows in the batch
  at::Tensor h;         // [N, H]; copied only if h is broadcast to the batch of x
  at::Tensor x;         // [*B, D]
  at::Tensor log_prob;  // [*S, *B]

  LinearBernoulliOperands(const char* op_in, const at::Tensor& h_in, const at::Tensor& weight_in,
                          const at::Tensor& bias_in, const at::Tensor& x_in)
      : Linear(op_in, h_in, weight_in, bias_in) {
    check_event(op, {"x", x_in});
    check_same_device(op, {"h", h_in}, {"x", x_in});
    TORCH_CHECK_VALUE(x_in.size(-1) == D, op, ": expected the last dimension of x to be ", D,
                      ", the rows of weight, got ", x_in.size(-1));
    x = observation(op, x_in, compute);
    batch = broadcast_batch(op, {"h", h_in}, {"x", x});
    N = c10::multiply_integers(batch);
    h = batch_sizes(h_in) == at::IntArrayRef(batch) ? as_rows(h_in, N)
                                                    : h_in.expand(concat(batch, {H})).reshape({N, H});
    log_prob = aten::empty(batch, weight.options().dtype(compute));
  }

  // Calls body(Type<compute_t>{}, Type<x_t>{}).
  template <typename Body>
  void dispatch(const Body& body) const {
    dispatch_computed(compute, [&](auto type) {
      if (x.scalar_type() == at::kByte) {
        return body(type, Type<uint8_t>{});
      }
      body(type, type);
    });
  }
};

struct LinearBernoulliLogProb : LinearBernoulliOperands {
  bool keeps;         // true if the logits take at most `kept_bytes`
  at::Tensor logits;  // [N, D], without the bias, if kept; otherwise [0, D]
  RowMap<1> rows;     // operand: x

  LinearBernoulliLogProb(const at::Tensor& h_in, const at::Tensor& weight_in, const at::Tensor& bias_in,
                         const at::Tensor& x_in, int64_t kept_bytes)
      : LinearBernoulliOperands("linear_bernoulli_log_prob", h_in, weight_in, bias_in, x_in) {
    keeps = N * D * static_cast<int64_t>(c10::elementSize(compute)) <= kept_bytes;
    logits = aten::empty({0, D}, log_prob.options());
    rows = map_rows<1>(batch, {row_strides(x, batch)});
  }
};

// The gradients of sum_n upstream_n log p(x_n | h_n).
struct LinearBernoulliGradients : LinearBernoulliOperands {
  at::Tensor upstream;  // broadcasts to [*S, *B]; undefined if every element is 1
  at::Tensor logits;    // [N, D] if the forward pass kept them, otherwise [0, D]
  bool with_grad_h, with_grad_weight;
  Rows grad_h;               // [N, H]
  LayerGradients gradients;  // of weight and bias
  RowMap<2> rows;            // operands: x, upstream

  LinearBernoulliGradients(const char* op_in, const at::Tensor& h_in, const at::Tensor& weight_in,
                           const at::Tensor& bias_in, const at::Tensor& x_in, const Argument& upstream_in,
                           const std::optional<at::Tensor>& logits_in, int64_t (*rows_of_sum)(at::ScalarType),
                           bool with_grad_h_in, bool with_grad_weight_in)
      : LinearBernoulliOperands(op_in, h_in, weight_in, bias_in, x_in),
        with_grad_h(with_grad_h_in),
        with_grad_weight(with_grad_weight_in),
        grad_h{N, dtype},
        gradients(*this, N, rows_of_sum(compute), with_grad_weight) {
    at::DimVector upstream_strides(batch.size(), 0);
    if (upstream_in.tensor.defined()) {
      check_same_device(op, {"h", h_in}, upstream_in);
      check_row_weights(op, upstream_in, c10::fromIntArrayRefSlow(batch));
      upstream = in_type(upstream_in.tensor, compute);
      upstream_strides = row_strides(upstream, batch, 0);
    }
    rows = map_rows<2>(batch, {row_strides(x, batch), upstream_strides});
    logits = logits_in ? logits_in->contiguous() : aten::empty({0, D}, log_prob.options());
    check_same_device(op, {"h", h_in}, {"logits", logits});
    TORCH_CHECK_VALUE(logits.sizes() == at::IntArrayRef({N, D}) || logits.sizes() == at::IntArrayRef({0, D}), op,
                      ": expected logits to have shape [", N, ", ", D, "] or [0, ", D, "], got ", logits.sizes());
    TORCH_CHECK_TYPE(logits.scalar_type() == compute, op, ": expected logits to be ", compute, ", got ",
                     logits.scalar_type());
  }

  // Calls write_gradient(first row, products, grad_logits, sums) for every chunk:
  //
  //   products [rows, D]: h weight^T;
  //   grad_logits [rows, D]: receives the gradient of the logits, and may alias products;
  //   sums [pieces, D]: receives one sum for every rows_of_sum(compute) rows of grad_logits.
  //
  // If the batch is small, `sums` is undefined, and small_batch_gradients() computes the sum instead.
  template <typename Kernels, typename WriteGradient>
  void accumulate(const WriteGradient& write_gradient) {
    const bool kept = logits.size(0) > 0;
    if constexpr (Kernels::kOwnSmallBatches) {
      if (N <= Kernels::small_batch_limit()) {
        const at::Tensor products = kept ? logits : Kernels::products(*this, h);
        const at::Tensor grad_logits = !kept && dtype == compute ? products : aten::empty({N, D}, options());
        write_gradient(0, products, grad_logits, at::Tensor());
        gradients.weight = aten::empty({with_grad_weight ? D : 0, H}, options());
        gradients.bias = aten::empty({D}, options());
        grad_h.tensor = aten::empty({with_grad_h ? N : 0, H}, options());
        Kernels::small_batch_gradients(*this, h, grad_logits, gradients.weight, gradients.bias, grad_h.tensor);
        return;
      }
    }
    const bool in_place = !kept && operand == compute;
    const at::Tensor buffer =
        in_place ? at::Tensor() : aten::empty({std::min(N, chunk_rows()), D}, weight.options().dtype(operand));
    const auto add = [&](int64_t first, const at::Tensor& h_rows, const at::Tensor& products) {
      const at::Tensor grad_logits = in_place ? products : rows_of(buffer, 0, h_rows.size(0));
      gradients.template add<Kernels>(first, h_rows, grad_logits, [&](const at::Tensor& sums) {
        write_gradient(first, products, grad_logits, sums);
      });
      if (with_grad_h) {
        grad_h.put(first, Kernels::product(grad_logits, weight, dtype));
      }
    };
    if (!kept) {
      return for_products<Kernels>(h, false, add);
    }
    for_chunks(h, chunk_rows(), [&](int64_t first, const at::Tensor& h_rows) {
      add(first, h_rows, rows_of(logits, first, h_rows.size(0)));
    });
  }

  at::TensorOptions options() const { return weight.options().dtype(dtype); }

  // Returns the gradients of h, weight and bias in the promoted dtype. A gradient that is not needed is empty. The
  // gradient of h is [*S, *B, H].
  std::tuple<at::Tensor, at::Tensor, at::Tensor> result() {
    const at::Tensor of_h = grad_h.all(H, weight.options());
    return {with_grad_h ? in_batch(of_h, batch) : of_h, in_type(gradients.weight, dtype),
            in_type(gradients.bias, dtype)};
  }
};

struct LinearBernoulliSample : Linear {
  int64_t N;             // number of rows in the batch
  at::Tensor h;          // [N, H]
  at::Tensor key;        // [2]
  at::ScalarType asked;  // dtype of the result
  at::Tensor x;          // [*B, D], uint8 or the promoted dtype

  LinearBernoulliSample(const at::Tensor& h_in, const at::Tensor& weight_in, const at::Tensor& bias_in,
                        const at::Tensor& key_in, std::optional<at::ScalarType> dtype_in)
      : Linear("linear_bernoulli_sample", h_in, weight_in, bias_in),
        N(c10::multiply_integers(batch_sizes(h_in))),
        h(as_rows(h_in, N)),
        key(key_in),
        asked(dtype_in.value_or(dtype)) {
    check_key(op, key, {"h", h_in});
    x = aten::empty(concat(batch_sizes(h_in), {D}), weight.options().dtype(written_dtype(op, asked, dtype)));
  }
};

// The ops that run a backend's kernels. `Kernels` must define these functions:
//
//   write_log_prob(call, first row, products): writes the log-likelihoods of a chunk;
//   write_gradient<with_log_prob>(call, ...): writes the gradient of a chunk, and also the log-likelihoods if
//     with_log_prob is true. accumulate() describes the other arguments;
//   rows_of_sum(compute): returns the number of rows in each partial sum of a gradient.
//
// If kOwnSmallBatches is true, `Kernels` must also define these functions:
//
//   small_batch_limit(): returns the largest batch size for which the next two functions are used;
//   products(layer, h): returns h weight^T [N, D];
//   small_batch_gradients(layer, h, grad_logits, grad_weight, grad_bias, grad_h): writes the last three arguments,
//     except empty tensors.
template <typename Kernels>
struct LinearBernoulliOps {
  static at::Tensor log_prob(const at::Tensor& h,       // [*S, *B, H]
                             const at::Tensor& weight,  // [D, H]
                             const at::Tensor& bias,    // [D]
                             const at::Tensor& x,       // [*B, D]
                             std::optional<bool>) {
    return std::get<0>(log_prob_and_logits(h, weight, bias, x, kKeepNone));
  }

  static std::tuple<at::Tensor, at::Tensor> log_prob_and_logits(const at::Tensor& h, const at::Tensor& weight,
                                                                const at::Tensor& bias, const at::Tensor& x,
                                                                int64_t kept_bytes) {
    LinearBernoulliLogProb call(h, weight, bias, x, kept_bytes);
    call.for_products<Kernels>(call.h, call.keeps, [&](int64_t first, const at::Tensor&, const at::Tensor& products) {
      Kernels::write_log_prob(call, first, products);
      if (call.keeps) {
        call.logits = products;
      }
    });
    return {call.log_prob, call.logits};
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad,  // [*S, *B]
                                                                 const at::Tensor& h, const at::Tensor& weight,
                                                                 const at::Tensor& bias, const at::Tensor& x,
                                                                 const std::optional<at::Tensor>& logits,  // [N, D]
                                                                 bool with_grad_h, bool with_grad_weight) {
    LinearBernoulliGradients call("linear_bernoulli_log_prob_backward", h, weight, bias, x, {"grad", grad}, logits,
                                  Kernels::rows_of_sum, with_grad_h, with_grad_weight);
    call.accumulate<Kernels>([&](auto&&... chunk) { Kernels::template write_gradient<false>(call, chunk...); });
    return call.result();
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> log_prob_and_gradients(
      const at::Tensor& h, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& x,
      const std::optional<at::Tensor>& sample_weight,  // broadcasts to [*S, *B]
      bool with_grad_h, bool with_grad_weight) {
    const at::Tensor upstream = sample_weight.value_or(at::Tensor());
    LinearBernoulliGradients call("linear_bernoulli_log_prob_sum", h, weight, bias, x, {"sample_weight", upstream}, {},
                                  Kernels::rows_of_sum, with_grad_h, with_grad_weight);
    call.accumulate<Kernels>([&](auto&&... chunk) { Kernels::template write_gradient<true>(call, chunk...); });
    return std::tuple_cat(std::tuple(call.log_prob), call.result());
  }

  static void implement(Registrar& m) {
    m.impl("linear_bernoulli_log_prob", log_prob);
    m.impl("linear_bernoulli_log_prob_and_logits", log_prob_and_logits);
    m.impl("linear_bernoulli_log_prob_backward", backward);
    m.impl("linear_bernoulli_log_prob_and_gradients", log_prob_and_gradients);
  }
};

}  // namespace wakesleep
