// log p(x; h weight^T + bias) and its gradients, on CUDA, a chunk of rows at a time.
#include "../activations.h"
#include "../linear_bernoulli.h"
#include "bernoulli_rows.cuh"
#include "small_batch.cuh"

namespace wakesleep::cuda {
namespace {

template <typename compute_t, typename x_t>
struct LinearBernoulliLogProbRows {
  const compute_t* __restrict__ products;
  const compute_t* __restrict__ bias;
  const x_t* __restrict__ x;
  compute_t* __restrict__ log_prob;
  RowMap<1> rows;
  int64_t first;   // first row of the chunk
  int64_t stride;  // row stride of products
  int64_t D;

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t row) const {
    const ProductAndBias<compute_t> logits = {products + row * stride, bias};
    const int past = past_boundary<kPacket<compute_t>>(logits.product);
    write_log_prob<kPacket<compute_t>>(team, D, past, logits, x + rows(first + row).of[0], log_prob + first + row);
  }
};

// Writes the gradient of a chunk's logits and, if with_log_prob is true, the log-likelihoods. row_kernel uses this
// struct to process rows separately. summed_rows_kernel also sums the gradient over rows. grad_logits may alias
// products.
template <typename compute_t, typename x_t, typename grad_t, bool with_log_prob>
struct LinearBernoulliLogProbBackwardRows {
  static constexpr int kSpan = kPacket<compute_t>;
  const compute_t* products;
  const compute_t* __restrict__ bias;
  const x_t* __restrict__ x;
  const compute_t* __restrict__ upstream;  // null if all are 1
  compute_t* __restrict__ log_prob;
  grad_t* grad_logits;
  RowMap<2> rows;
  int64_t first;  // first row of the chunk
  int64_t products_stride, grad_stride;
  int64_t D;

  struct Row {
    int64_t row;  // index within the chunk
    const x_t* x;
    compute_t weight;
    LogProbSum<compute_t> log_prob;
  };

  __device__ Row begin(int64_t row) const {
    const auto offset = rows(first + row);
    return {row, x + offset.of[0], upstream == nullptr ? compute_t(1) : upstream[offset.of[1]], {}};
  }

  struct Read {
    Packet<compute_t, kSpan> a, x;
  };

  template <typename Span>
  __device__ Read read(const Row& its, Span span) const {
    return {load<compute_t, Written>(span, products + its.row * products_stride), load<compute_t>(span, its.x)};
  }

  template <typename Span>
  __device__ auto make(Row& its, Span span, const Read& of) const {
    const auto b = load<compute_t>(span, bias);
    auto a = of.a;
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      a.value[i] += b.value[i];
    }
    if constexpr (with_log_prob) {
      its.log_prob.add(span, a, of.x);
    }
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      a.value[i] = its.weight * bernoulli_grad_logits(a.value[i], of.x.value[i]);
    }
    store(span, a, grad_logits + its.row * grad_stride);
    return a;
  }

  template <int threads>
  __device__ void end(Team<threads> team, const Row& its) const {
    if constexpr (with_log_prob) {
      its.log_prob.write(team, log_prob + first + its.row);
    }
  }

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t row) const {
    Row its = begin(row);
    for_spans<kSpan>(team, D, 0, [&](auto span) { make(its, span, read(its, span)); });
    end(team, its);
  }

  struct RowsOfWarp {
    int held;
    Row of[kRowsOfWarp<compute_t>];
  };

  __device__ RowsOfWarp begin(int64_t row, int held) const {
    RowsOfWarp kept = {held, {}};
#pragma unroll
    for (int r = 0; r < kRowsOfWarp<compute_t>; ++r) {
      kept.of[r] = begin(row + (r < held ? r : 0));
    }
    return kept;
  }

  template <typename Span>
  __device__ Read read(const RowsOfWarp& kept, int r, Span span) const {
    return read(kept.of[r], span);
  }

  template <typename Span>
  __device__ auto make(RowsOfWarp& kept, int r, Span span, const Read& of) const {
    return make(kept.of[r], span, of);
  }

  __device__ void end(const RowsOfWarp& kept) const {
#pragma unroll
    for (int r = 0; r < kRowsOfWarp<compute_t>; ++r) {
      if (r < kept.held) {
        end(Team<32>{}, kept.of[r]);
      }
    }
  }
};

template <typename compute_t>
struct WriteProduct {
  compute_t* __restrict__ products;
  int64_t D;

  __device__ void operator()(int64_t row, int64_t column, compute_t product) const {
    products[row * D + column] = product;
  }
};

struct Kernels : PlatformProducts {
  static constexpr bool kOwnSmallBatches = true;
  static int64_t small_batch_limit() { return cuda::small_batch_limit(); }
  static int64_t rows_of_sum(at::ScalarType compute) { return cuda::rows_of_sum(compute); }

  static void write_log_prob(const LinearBernoulliLogProb& call, int64_t first,
                             const at::Tensor& products) {  // [rows, D]
    call.dispatch([&](auto type, auto x_type) {
      using compute_t = typename decltype(type)::type;
      using x_t = typename decltype(x_type)::type;
      launch_rows(
          products.size(0), call.D,
          LinearBernoulliLogProbRows<compute_t, x_t>{
              products.const_data_ptr<compute_t>(), call.bias.const_data_ptr<compute_t>(), call.x.const_data_ptr<x_t>(),
              call.log_prob.mutable_data_ptr<compute_t>(), call.rows, first, products.stride(0), call.D});
    });
  }

  template <bool with_log_prob>
  static void write_gradient(const LinearBernoulliGradients& call, int64_t first,
                             const at::Tensor& products,     // [rows, D]
                             const at::Tensor& grad_logits,  // [rows, D]
                             const at::Tensor& sums) {       // [pieces, D], or undefined
    call.dispatch([&](auto type, auto x_type) {
      using compute_t = typename decltype(type)::type;
      using x_t = typename decltype(x_type)::type;
      const auto launch_for = [&](auto grad_type) {
        using grad_t = typename decltype(grad_type)::type;
        const LinearBernoulliLogProbBackwardRows<compute_t, x_t, grad_t, with_log_prob> rows = {
            products.const_data_ptr<compute_t>(),
            call.bias.const_data_ptr<compute_t>(),
            call.x.const_data_ptr<x_t>(),
            call.upstream.defined() ? call.upstream.const_data_ptr<compute_t>() : nullptr,
            call.log_prob.mutable_data_ptr<compute_t>(),
            grad_logits.mutable_data_ptr<grad_t>(),
            call.rows,
            first,
            products.stride(0),
            grad_logits.stride(0),
            call.D};
        if (sums.defined()) {
          launch_summed_rows(rows, sums.mutable_data_ptr<compute_t>(), products.size(0), call.D);
        } else {  // a small batch uses one block per row
          launch_teams(Team<kBlockThreads>{}, products.size(0), rows);
        }
      };
      if constexpr (std::is_same_v<compute_t, float>) {
        if (grad_logits.scalar_type() != at::kFloat) {
          return dispatch_half(grad_logits.scalar_type(), launch_for);
        }
      }
      launch_for(type);
    });
  }

  static at::Tensor products(const Linear& call, const at::Tensor& h) {  // [N, H]
    const FewRows operands(h, call.weight, call.dtype);
    at::Tensor products = aten::empty({h.size(0), call.D}, h.options().dtype(call.compute));
    dispatch_floating(call.op, call.dtype, [&](auto type) {
      using scalar_t = typename decltype(type)::type;
      using compute_t = at::opmath_type<scalar_t>;
      launch_layer<scalar_t>(operands, WriteProduct<compute_t>{products.mutable_data_ptr<compute_t>(), call.D});
    });
    return products;
  }

  static void small_batch_gradients(const Linear& call,
                                    const at::Tensor& h,            // [N, H]
                                    const at::Tensor& grad_logits,  // [N, D]
                                    const at::Tensor& grad_weight,  // [D, H]
                                    const at::Tensor& grad_bias,    // [D]
                                    const at::Tensor& grad_h) {     // [N, H]
    const FewRows operands(h, call.weight, call.dtype);
    dispatch_floating(call.op, call.dtype, [&](auto type) {
      using scalar_t = typename decltype(type)::type;
      launch_layer_gradients<scalar_t>(operands, grad_logits, grad_weight, grad_bias, grad_h, Identity{});
    });
  }
};

}  // namespace

WAKESLEEP_KERNELS(CUDA, m) { LinearBernoulliOps<Kernels>::implement(m); }

}  // namespace wakesleep::cuda
