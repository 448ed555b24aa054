// Bernoulli heads, whose logits are a product, h weight^T + bias: checked operands of a call, shared by its CPU and
// CUDA kernel, and the loop over chunks of rows that they have in common. No more logits are held than stay in cache.
//
// The products are the platform's, of h and weight alone. The row kernels add the bias as they read, so that nothing
// passes over the logits for its sake. A type of 16 bits is multiplied as it is on a GPU, whose tensor cores accumulate
// in float32, and in float32 on a CPU; results are float32 either way, and so are the sums of gradients.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/mm.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <limits>

#include "bernoulli.h"

namespace wakesleep {

constexpr int64_t kMiB = 1 << 20;

// What stays in cache: the second level of a CPU's cores, that of a GPU.
inline int64_t cached_bytes(at::Device device) { return device.is_cuda() ? 16 * kMiB : at::get_num_threads() * kMiB; }

// Logits of so many bytes are kept for the backward pass rather than recomputed, unless the caller chooses.
constexpr int64_t kKeepNone = -1, kKeepAll = std::numeric_limits<int64_t>::max();
inline int64_t kept_bytes(at::Device device) { return device.is_cuda() ? 16 * kMiB : 4 * kMiB; }

// to = a b, or to += a b, in the type of `to`.
inline void multiply(at::Tensor to, const at::Tensor& a, const at::Tensor& b, bool add = false) {
  if (to.scalar_type() == a.scalar_type()) {
    add ? to.addmm_(a, b) : at::mm_out(to, a, b);
  } else if (a.is_cuda()) {
    add ? to.add_(at::mm(a, b, to.scalar_type())) : at::mm_out(to, a, b, to.scalar_type());
  } else {
    add ? to.add_(at::mm(a, b)) : to.copy_(at::mm(a, b));
  }
}

struct LinearBernoulli {
  // The products are what the backend makes of them: autograd and autocast have had their say.
  const c10::DeviceGuard device;
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};

  const char* op;
  at::ScalarType dtype;    // of the parameters, promoted
  at::ScalarType compute;  // of logits, and of sums of gradients
  at::ScalarType operand;  // of what is multiplied
  at::Tensor weight;       // [D, H]
  at::Tensor bias;         // [D]
  int64_t H, D;

  LinearBernoulli(const char* op_in, const at::Tensor& h, const at::Tensor& weight_in, const at::Tensor& bias_in)
      : device(h.device()), op(op_in) {
    const Argument h_argument = {"h", h}, weight_argument = {"weight", weight_in}, bias_argument = {"bias", bias_in};
    for (const Argument& argument : {h_argument, weight_argument, bias_argument}) {
      check_floating(op, argument);
      check_same_device(op, h_argument, argument);
    }
    check_event(op, h_argument);
    TORCH_CHECK_VALUE(weight_in.dim() == 2, op, ": expected weight to have shape [D, H], got ", weight_in.sizes());
    D = weight_in.size(0);
    H = weight_in.size(1);
    TORCH_CHECK_VALUE(h.size(-1) == H, op, ": expected the last dimension of h to be ", H, ", that of weight, got ",
                      h.size(-1));
    TORCH_CHECK_VALUE(bias_in.dim() == 1 && bias_in.size(0) == D, op, ": expected bias to have shape [", D,
                      "], one for each row of weight, got ", bias_in.sizes());
    dtype = c10::promoteTypes(c10::promoteTypes(h.scalar_type(), weight_in.scalar_type()), bias_in.scalar_type());
    compute = at::toOpMathType(dtype);
    operand = h.is_cuda() ? dtype : compute;
    weight = weight_in.to(operand);
    bias = bias_in.to(compute).contiguous();
  }

  // Rows in a chunk: what stays in cache, but enough that products do not suffer.
  int64_t chunk_rows() const {
    constexpr int64_t kFewest = 32;
    const int64_t row_bytes = std::max<int64_t>(1, D) * static_cast<int64_t>(c10::elementSize(compute));
    return std::max(kFewest, cached_bytes(weight.device()) / row_bytes / kFewest * kFewest);
  }

  // A buffer for a chunk of N rows; each begins on a boundary of 64 bytes.
  at::Tensor chunk(int64_t N, at::ScalarType type) const {  // [rows, D]
    constexpr int64_t kBoundary = 64;
    const int64_t per_boundary = kBoundary / static_cast<int64_t>(c10::elementSize(type));
    const int64_t stride = (D + per_boundary - 1) / per_boundary * per_boundary;
    return at::empty({std::min(N, chunk_rows()), stride}, weight.options().dtype(type)).narrow(1, 0, D);
  }

  // body(first row, rows of h [rows, H]) for every chunk of h [N, H].
  template <typename Body>
  void for_chunks(const at::Tensor& h, const Body& body) const {
    const int64_t N = h.size(0), at_once = chunk_rows();
    for (int64_t first = 0; first < N; first += at_once) {
      body(first, h.narrow(0, first, std::min(at_once, N - first)).to(operand));
    }
  }

  // body(first row, rows of h [rows, H], their products with weight [rows, D]) for every chunk of h [N, H]; the
  // products in their places in `kept` if it is [N, D], otherwise in a buffer.
  template <typename Body>
  void for_products(const at::Tensor& h, const at::Tensor& kept, const Body& body) const {
    const bool keeps = kept.defined() && kept.size(0) > 0;
    const at::Tensor buffer = keeps ? kept : chunk(h.size(0), compute);
    for_chunks(h, [&](int64_t first, const at::Tensor& h_rows) {
      const at::Tensor products = buffer.narrow(0, keeps ? first : 0, h_rows.size(0));
      multiply(products, h_rows, weight.t());
      body(first, h_rows, products);
    });
  }
};

// A head beside an observation.
struct LinearBernoulliOperands : LinearBernoulli {
  at::DimVector batch;  // what the leading dimensions of h and x broadcast to
  int64_t N;            // rows of the batch
  at::Tensor h;         // [N, H]; copied only where x has batch dimensions that h has not
  at::Tensor x;         // [*B, D]
  at::Tensor log_prob;  // [*S, *B]

  LinearBernoulliOperands(const char* op_in, const at::Tensor& h_in, const at::Tensor& weight_in,
                          const at::Tensor& bias_in, const at::Tensor& x_in)
      : LinearBernoulli(op_in, h_in, weight_in, bias_in) {
    check_event(op, {"x", x_in});
    check_same_device(op, {"h", h_in}, {"x", x_in});
    TORCH_CHECK_VALUE(x_in.size(-1) == D, op, ": expected the last dimension of x to be ", D,
                      ", the rows of weight, got ", x_in.size(-1));
    x = observation(op, x_in, compute);
    batch = broadcast_batch(op, {"h", h_in}, {"x", x});
    N = c10::multiply_integers(batch);
    h = h_in.expand(concat(batch, {H})).reshape({N, H});
    log_prob = at::empty(batch, weight.options().dtype(compute));
  }

  // body(Type<compute_t>{}, Type<x_t>{}).
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
  at::Tensor logits;  // [N, D], without bias, if these are no more than `kept_bytes`; otherwise [0, D]
  RowMap<1> rows;     // of x

  LinearBernoulliLogProb(const at::Tensor& h_in, const at::Tensor& weight_in, const at::Tensor& bias_in,
                         const at::Tensor& x_in, int64_t kept_bytes)
      : LinearBernoulliOperands("linear_bernoulli_log_prob", h_in, weight_in, bias_in, x_in) {
    const bool kept = N * D * static_cast<int64_t>(c10::elementSize(compute)) <= kept_bytes;
    logits = at::empty({kept ? N : 0, D}, log_prob.options());
    rows = map_rows<1>(batch, {row_strides(x, batch)});
  }
};

// The gradients of sum_n upstream_n log p(x_n | h_n).
struct LinearBernoulliGradients : LinearBernoulliOperands {
  at::Tensor upstream;     // [*S, *B], or undefined: ones
  at::Tensor logits;       // [N, D], as the forward pass has kept them; or [0, D]
  at::Tensor grad_h;       // [N, H], or without elements where it is not wanted
  at::Tensor grad_weight;  // [D, H], or without elements where it is not wanted
  at::Tensor grad_bias;    // [D]
  RowMap<2> rows;          // of x and upstream

  LinearBernoulliGradients(const char* op_in, const at::Tensor& h_in, const at::Tensor& weight_in,
                           const at::Tensor& bias_in, const at::Tensor& x_in, const Argument& upstream_in,
                           const std::optional<at::Tensor>& logits_in, bool with_grad_h, bool with_grad_weight)
      : LinearBernoulliOperands(op_in, h_in, weight_in, bias_in, x_in) {
    at::DimVector upstream_strides(batch.size(), 0);
    if (upstream_in.tensor.defined()) {
      check_same_device(op, {"h", h_in}, upstream_in);
      check_row_weights(op, upstream_in, c10::fromIntArrayRefSlow(batch));
      upstream = upstream_in.tensor.to(compute);
      upstream_strides = row_strides(upstream, batch, 0);
    }
    rows = map_rows<2>(batch, {row_strides(x, batch), upstream_strides});
    logits = logits_in ? logits_in->contiguous() : at::empty({0, D}, log_prob.options());
    TORCH_CHECK_VALUE(logits.numel() == 0 || logits.sizes() == at::IntArrayRef({N, D}), op,
                      ": expected logits to have shape [", N, ", ", D, "], got ", logits.sizes());
    TORCH_CHECK_TYPE(logits.scalar_type() == compute, op, ": expected logits to be ", compute, ", got ",
                     logits.scalar_type());
    grad_h = at::empty({with_grad_h ? N : 0, H}, weight.options().dtype(dtype));
    grad_weight = at::empty({with_grad_weight ? D : 0, H}, log_prob.options());
    grad_bias = at::empty({D}, log_prob.options());
    if (N == 0) {
      grad_weight.zero_();
      grad_bias.zero_();
    }
  }

  // write_gradient(first row, products [rows, D] of h and weight, gradient of the logits [rows, D], its sums over every
  // `piece_rows` rows [pieces, D]) for every chunk. The gradient may be written where the products are.
  template <typename WriteGradient>
  void accumulate(int64_t piece_rows, const WriteGradient& write_gradient) {
    const auto pieces = [&](int64_t count) { return (count + piece_rows - 1) / piece_rows; };
    const bool kept = logits.size(0) > 0, in_place = !kept && operand == compute;
    const at::Tensor buffer = in_place ? at::Tensor() : chunk(N, operand);
    const at::Tensor all_sums = at::empty({pieces(std::min(N, chunk_rows())), D}, grad_bias.options());
    const auto add = [&](int64_t first, const at::Tensor& h_rows, const at::Tensor& products) {
      const int64_t count = h_rows.size(0);
      const at::Tensor grad_logits = in_place ? products : buffer.narrow(0, 0, count);
      const at::Tensor sums = all_sums.narrow(0, 0, pieces(count));
      write_gradient(first, products, grad_logits, sums);
      first == 0 ? at::sum_out(grad_bias, sums, 0) : grad_bias.add_(at::sum(sums, 0));
      if (grad_h.size(0) == N) {
        multiply(grad_h.narrow(0, first, count), grad_logits, weight);
      }
      if (grad_weight.size(0) == D) {
        multiply(grad_weight, grad_logits.t(), h_rows, first > 0);
      }
    };
    if (!kept) {
      return for_products(h, logits, add);
    }
    for_chunks(h, [&](int64_t first, const at::Tensor& h_rows) {
      add(first, h_rows, logits.narrow(0, first, h_rows.size(0)));
    });
  }

  // For h, weight and bias.
  std::tuple<at::Tensor, at::Tensor, at::Tensor> gradients() const {
    const bool with_grad_h = grad_h.size(0) == N;
    return {with_grad_h ? grad_h.view(concat(batch, {H})) : grad_h, grad_weight.to(dtype), grad_bias.to(dtype)};
  }
};

struct LinearBernoulliSample : LinearBernoulli {
  int64_t N;             // rows of the batch
  at::Tensor h;          // [N, H]
  at::Tensor key;        // [2]
  at::ScalarType asked;  // dtype of the result
  at::Tensor x;          // [*B, D], bytes or in the dtype of the parameters

  LinearBernoulliSample(const at::Tensor& h_in, const at::Tensor& weight_in, const at::Tensor& bias_in,
                        const at::Tensor& key_in, std::optional<at::ScalarType> dtype_in)
      : LinearBernoulli("linear_bernoulli_sample", h_in, weight_in, bias_in),
        N(c10::multiply_integers(batch_sizes(h_in))),
        h(h_in.reshape({N, H})),
        key(key_in),
        asked(dtype_in.value_or(dtype)) {
    check_key(op, key, {"h", h_in});
    x = at::empty(concat(batch_sizes(h_in), {D}), weight.options().dtype(written_dtype(op, asked, dtype)));
  }
};

// The ops over a backend's kernels: write_log_prob(call, first row, products) and write_gradient<with_log_prob>(call,
// ...), the arguments being those of accumulate(), with the sums over every rows_of_sum(compute) rows.
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
    const LinearBernoulliLogProb call(h, weight, bias, x, kept_bytes);
    call.for_products(call.h, call.logits, [&](int64_t first, const at::Tensor&, const at::Tensor& products) {
      Kernels::write_log_prob(call, first, products);
    });
    return {call.log_prob, call.logits};
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad,  // [*S, *B]
                                                                 const at::Tensor& h, const at::Tensor& weight,
                                                                 const at::Tensor& bias, const at::Tensor& x,
                                                                 const std::optional<at::Tensor>& logits,  // [N, D]
                                                                 bool with_grad_h, bool with_grad_weight) {
    LinearBernoulliGradients call("linear_bernoulli_log_prob_backward", h, weight, bias, x, {"grad", grad}, logits,
                                  with_grad_h, with_grad_weight);
    call.accumulate(Kernels::rows_of_sum(call.compute),
                    [&](auto&&... chunk) { Kernels::template write_gradient<false>(call, chunk...); });
    return call.gradients();
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> log_prob_and_gradients(
      const at::Tensor& h, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& x,
      const std::optional<at::Tensor>& importance,  // broadcasts to [*S, *B]
      bool with_grad_h, bool with_grad_weight) {
    const at::Tensor upstream = importance.value_or(at::Tensor());
    LinearBernoulliGradients call("linear_bernoulli_log_prob_sum", h, weight, bias, x, {"importance", upstream}, {},
                                  with_grad_h, with_grad_weight);
    call.accumulate(Kernels::rows_of_sum(call.compute),
                    [&](auto&&... chunk) { Kernels::template write_gradient<true>(call, chunk...); });
    return std::tuple_cat(std::tuple(call.log_prob), call.gradients());
  }

  static void implement(torch::Library& m) {
    m.impl("linear_bernoulli_log_prob", log_prob);
    m.impl("linear_bernoulli_log_prob_and_logits", log_prob_and_logits);
    m.impl("linear_bernoulli_log_prob_backward", backward);
    m.impl("linear_bernoulli_log_prob_and_gradients", log_prob_and_gradients);
  }
};

}  // namespace wakesleep
