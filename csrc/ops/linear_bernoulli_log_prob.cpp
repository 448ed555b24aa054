// log p(x; h weight^T + bias) and its gradients.
#include "kept_logits.h"
#include "linear_bernoulli.h"
#include "register.h"

namespace wakesleep {
namespace {

// The operands of a Bernoulli head and an observation x.
struct HeadAndX : Head {
  at::DimVector batch;  // broadcast shape of the leading dimensions of h and x
  int64_t N;            // number of rows in the batch
  at::Tensor h;         // [N, H]; copied only if h is broadcast to the batch of x
  at::Tensor x;         // [*B, D]

  HeadAndX(const char* op_in, const at::Tensor& h_in, const at::Tensor& weight_in, const at::Tensor& bias_in,
           const at::Tensor& x_in)
      : Head(op_in, h_in, weight_in, bias_in) {
    check_event(op, {"x", x_in});
    check_same_device(op, {"h", h_in}, {"x", x_in});
    TORCH_CHECK_VALUE(x_in.size(-1) == D, op, ": expected the last dimension of x to be ", D,
                      ", the rows of weight, got ", x_in.size(-1));
    x = observation(op, x_in, compute);
    batch = broadcast_batch(op, {"h", h_in}, {"x", x});
    N = c10::multiply_integers(batch);
    h = batch_sizes(h_in) == at::IntArrayRef(batch) ? as_rows(h_in, N)
                                                    : h_in.expand(concat(batch, {H})).reshape({N, H});
  }

  at::TensorOptions compute_options() const { return weight.options().dtype(compute); }
};

// ---- forward -------------------------------------------------------------------------------------------------------

// Also returns the logits [N, D] without their bias if they take at most `kept_bytes`, otherwise [0, D].
std::tuple<at::Tensor, at::Tensor> linear_bernoulli_log_prob_and_logits(const at::Tensor& h,       // [*S, *B, H]
                                                                        const at::Tensor& weight,  // [D, H]
                                                                        const at::Tensor& bias,    // [D]
                                                                        const at::Tensor& x,       // [*B, D]
                                                                        int64_t kept_bytes) {
  const BelowAutograd below_autograd;
  const HeadAndX call("linear_bernoulli_log_prob", h, weight, bias, x);
  const bool keeps = call.N * call.D * static_cast<int64_t>(c10::elementSize(call.compute)) <= kept_bytes;
  const at::Tensor log_prob = at::empty(call.batch, call.compute_options());
  at::Tensor logits = at::empty({0, call.D}, log_prob.options());
  const auto rows = map_rows<1>(call.batch, {row_strides(call.x, call.batch)});
  call.for_products(call.h, keeps, [&](int64_t first, const at::Tensor&, const at::Tensor& products) {
    compute(call.device, LinearBernoulliLogProb{dtype_of(call.compute), dtype_of(call.x), read(products),
                                                read(call.bias), read(call.x), write(log_prob, first), rows, first,
                                                products.size(0), call.D, products.stride(0)});
    if (keeps) {
      logits = products;
    }
  });
  return {log_prob, logits};
}

at::Tensor linear_bernoulli_log_prob(const at::Tensor& h, const at::Tensor& weight, const at::Tensor& bias,
                                     const at::Tensor& x, std::optional<bool>) {
  return std::get<0>(linear_bernoulli_log_prob_and_logits(h, weight, bias, x, kKeepNone));
}

// ---- backward ------------------------------------------------------------------------------------------------------

// The gradients of sum_n w_n log p(x_n | h_n) with w_n = scale upstream_n.
struct HeadGradients : HeadAndX {
  at::Tensor upstream;  // broadcasts to [*S, *B]; undefined if every element is 1
  double scale = 1;
  at::Tensor logits;    // [N, D] if the forward pass kept them, otherwise [0, D]
  at::Tensor terms;     // [*S, *B]: w_n log p(x_n | h_n), if the kernels write them, too
  at::Tensor log_prob;  // [*S, *B]: log p(x_n | h_n), if the kernels write them, too
  bool with_grad_h;
  Rows grad_h;  // [N, H]
  LayerGradients gradients;
  RowMap<2> rows;  // operands: x, upstream

  HeadGradients(const char* op_in, const at::Tensor& h_in, const at::Tensor& weight_in, const at::Tensor& bias_in,
                const at::Tensor& x_in, const Argument& upstream_in, const std::optional<at::Tensor>& logits_in,
                bool with_grad_h_in, bool with_grad_weight)
      : HeadAndX(op_in, h_in, weight_in, bias_in, x_in),
        with_grad_h(with_grad_h_in),
        grad_h{N, dtype},
        gradients(*this, *this, method(h), N, with_grad_weight) {
    at::DimVector upstream_strides(batch.size(), 0);
    if (upstream_in.tensor.defined()) {
      check_same_device(op, {"h", h_in}, upstream_in);
      check_row_weights(op, upstream_in, c10::fromIntArrayRefSlow(batch));
      upstream = in_type(upstream_in.tensor, compute);
      upstream_strides = row_strides(upstream, batch, 0);
    }
    rows = map_rows<2>(batch, {row_strides(x, batch), upstream_strides});
    logits = logits_in ? logits_in->contiguous() : at::empty({0, D}, compute_options());
    check_same_device(op, {"h", h_in}, {"logits", logits});
    TORCH_CHECK_VALUE(logits.sizes() == at::IntArrayRef({N, D}) || logits.sizes() == at::IntArrayRef({0, D}), op,
                      ": expected logits to have shape [", N, ", ", D, "] or [0, ", D, "], got ", logits.sizes());
    TORCH_CHECK_TYPE(logits.scalar_type() == compute, op, ": expected logits to be ", compute, ", got ",
                     logits.scalar_type());
  }

  // Adds the gradients of all chunks.
  void accumulate() {
    const bool is_small = method(h) == Method::small_batch, kept = logits.size(0) > 0;
    const auto grad_dtype = is_small ? dtype : device.is_cuda() ? operand : compute;
    const bool in_place = !kept && grad_dtype == compute;
    const int64_t most = is_small ? N : chunk_rows(D);
    const at::Tensor buffer =
        in_place ? at::Tensor() : at::empty({std::min(N, most), D}, weight.options().dtype(grad_dtype));
    const auto add = [&](int64_t first, const at::Tensor& h_rows, const at::Tensor& products) {
      add_chunk(first, h_rows, products, in_place ? products : rows_of(buffer, 0, h_rows.size(0)));
    };
    if (!kept) {
      return for_products(h, false, add);
    }
    for_chunks(h, std::max<int64_t>(1, most), [&](int64_t first, const at::Tensor& h_rows) {
      add(first, h_rows, rows_of(logits, first, h_rows.size(0)));
    });
  }

  // Adds the gradients of all chunks, and returns the sum, []. If `with_log_prob` is true, sets `log_prob`.
  at::Tensor accumulate_and_sum(bool with_log_prob) {
    if (method(h) == Method::small_batch && !with_log_prob) {
      return small_batch_sum();
    }
    terms = at::empty(batch, compute_options());
    if (with_log_prob) {
      log_prob = at::empty(batch, compute_options());
    }
    accumulate();
    return terms.sum();
  }

  // Returns the gradients of h, weight and bias in the promoted dtype. A gradient that is not needed is empty. The
  // gradient of h is [*S, *B, H].
  std::tuple<at::Tensor, at::Tensor, at::Tensor> result() {
    const at::Tensor of_h = grad_h.all(H, weight.options());
    return {with_grad_h ? in_batch(of_h, batch) : of_h, in_type(gradients.weight, dtype),
            in_type(gradients.bias, dtype)};
  }

 private:
  at::Tensor small_batch_sum() {
    const SmallBatch small(h, *this, dtype);
    const at::Tensor grad_products = at::empty({N, D}, weight.options().dtype(dtype));
    const at::Tensor parts = at::empty({tiles_of(N, D)}, compute_options()), sum = at::empty({}, compute_options());
    small.compute(SmallBatchBernoulliGradient{small.layer(), read(bias), dtype_of(x), read(x), read(upstream), scale,
                                              rows, write(grad_products), write(parts)});
    const at::Tensor of_h = gradients.small_batch_add(h, Activation::identity, grad_products, {},
                                                      Terms{read(parts), parts.numel(), write(sum)}, with_grad_h);
    if (with_grad_h) {
      grad_h.put(0, of_h);
    }
    return sum;
  }

  void add_chunk(int64_t first, const at::Tensor& h_rows, const at::Tensor& products, const at::Tensor& grad_logits) {
    const at::Tensor sums = gradients.sums(first, h_rows.size(0));
    wakesleep::compute(device,
                       LinearBernoulliGradient{dtype_of(compute), dtype_of(x), read(products), read(bias), read(x),
                                               read(upstream), scale, write(terms, first), write(log_prob, first),
                                               dtype_of(grad_logits), write(grad_logits), write(sums), rows, first,
                                               products.size(0), D, products.stride(0), grad_logits.stride(0)});
    const at::Tensor of_h = gradients.add(first, h_rows, Activation::identity, grad_logits, with_grad_h);
    if (with_grad_h) {
      grad_h.put(first, of_h);
    }
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_bernoulli_log_prob_backward(
    const at::Tensor& grad,  // [*S, *B]
    const at::Tensor& h, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& x,
    const std::optional<at::Tensor>& logits,  // [N, D]
    bool with_grad_h, bool with_grad_weight) {
  const BelowAutograd below_autograd;
  HeadGradients call("linear_bernoulli_log_prob_backward", h, weight, bias, x, {"grad", grad}, logits, with_grad_h,
                     with_grad_weight);
  call.accumulate();
  return call.result();
}

// Also returns the log-likelihoods [*S, *B], or an empty tensor [0] if they are not needed.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_bernoulli_log_prob_and_gradients(
    const at::Tensor& h, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& x,
    const std::optional<at::Tensor>& sample_weight,  // broadcasts to [*S, *B]
    double scale, bool with_grad_h, bool with_grad_weight, bool with_log_prob) {
  const BelowAutograd below_autograd;
  const at::Tensor upstream = sample_weight.value_or(at::Tensor());
  HeadGradients call("linear_bernoulli_log_prob_sum", h, weight, bias, x, {"sample_weight", upstream}, {}, with_grad_h,
                     with_grad_weight);
  call.scale = scale;
  const at::Tensor sum = call.accumulate_and_sum(with_log_prob);
  const at::Tensor log_prob = with_log_prob ? call.log_prob : at::empty({0}, sum.options());
  return std::tuple_cat(std::tuple(sum, log_prob), call.result());
}

}  // namespace

WAKESLEEP_OPS(m) {
  m.impl("linear_bernoulli_log_prob", linear_bernoulli_log_prob);
  m.impl("linear_bernoulli_log_prob_and_logits", linear_bernoulli_log_prob_and_logits);
  m.impl("linear_bernoulli_log_prob_backward", linear_bernoulli_log_prob_backward);
  m.impl("linear_bernoulli_log_prob_and_gradients", linear_bernoulli_log_prob_and_gradients);
}

}  // namespace wakesleep
