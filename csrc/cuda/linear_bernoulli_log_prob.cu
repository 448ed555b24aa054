// log p(x; h weight^T + bias) and its gradients, on CUDA, a chunk of rows at a time.
#include <torch/library.h>

#include "../linear_bernoulli.h"
#include "bernoulli_rows.cuh"

namespace wakesleep::cuda {
namespace {

template <typename compute_t, typename x_t>
struct LinearBernoulliLogProbRows {
  const compute_t* __restrict__ products;
  const compute_t* __restrict__ bias;
  const x_t* __restrict__ x;
  compute_t* __restrict__ log_prob;
  RowMap<1> rows;
  int64_t first;   // row of the chunk
  int64_t stride;  // of products
  int64_t D;

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t row) const {
    const ProductAndBias<compute_t> logits = {products + row * stride, bias};
    const int past = past_boundary<kPacket<compute_t>>(logits.product);
    write_log_prob<kPacket<compute_t>>(team, D, past, logits, x + rows(first + row).of[0], log_prob + first + row);
  }
};

// The gradient of a chunk's logits, which may lie where the products do, with its sum over the rows of each team; and,
// where asked for, the log-likelihoods.
template <typename compute_t, typename x_t, typename grad_t, bool with_log_prob>
struct LinearBernoulliLogProbBackwardRows {
  const compute_t* products;
  const compute_t* __restrict__ bias;
  const x_t* __restrict__ x;
  const compute_t* __restrict__ upstream;  // null: ones
  compute_t* __restrict__ log_prob;
  grad_t* grad_logits;
  compute_t* __restrict__ sums;
  RowMap<2> rows;
  int64_t first;  // row of the chunk
  int64_t count;  // of rows
  int64_t products_stride, grad_stride;
  int64_t D;

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t piece) const {
    constexpr int rows_at_once = kRowsOfSum<compute_t>;
    const int64_t row = piece * rows_at_once;
    const int held = static_cast<int>(min(int64_t(rows_at_once), count - row));
    const x_t* v[rows_at_once];
    compute_t weight[rows_at_once];
    LogProbSum<compute_t> log_prob_sum[rows_at_once];
#pragma unroll
    for (int r = 0; r < rows_at_once; ++r) {
      const auto offset = rows(first + row + (r < held ? r : 0));
      v[r] = x + offset.of[0];
      weight[r] = upstream == nullptr ? compute_t(1) : upstream[offset.of[1]];
    }
    for_spans<kPacket<compute_t>>(team, D, 0, [&](auto span) {
      const auto b = load<compute_t>(span, bias);
      Packet<compute_t, span.size> total = {};
#pragma unroll
      for (int r = 0; r < rows_at_once; ++r) {
        if (r < held) {
          auto a = load<compute_t, Written>(span, products + (row + r) * products_stride);
          const auto v_packet = load<compute_t>(span, v[r]);
#pragma unroll
          for (int i = 0; i < span.size; ++i) {
            a.value[i] += b.value[i];
          }
          if constexpr (with_log_prob) {
            log_prob_sum[r].add(span, a, v_packet);
          }
#pragma unroll
          for (int i = 0; i < span.size; ++i) {
            a.value[i] = weight[r] * bernoulli_grad_logits(a.value[i], v_packet.value[i]);
            total.value[i] += a.value[i];
          }
          store(span, a, grad_logits + (row + r) * grad_stride);
        }
      }
      store(span, total, sums + piece * D);
    });
    if constexpr (with_log_prob) {
#pragma unroll
      for (int r = 0; r < rows_at_once; ++r) {
        if (r < held) {
          log_prob_sum[r].write(team, log_prob + first + row + r);
        }
      }
    }
  }
};

struct Kernels {
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
                             const at::Tensor& sums) {       // [pieces, D]
    call.dispatch([&](auto type, auto x_type) {
      using compute_t = typename decltype(type)::type;
      using x_t = typename decltype(x_type)::type;
      const auto launch_for = [&](auto grad_type) {
        using grad_t = typename decltype(grad_type)::type;
        launch_rows(sums.size(0), kRowsOfSum<compute_t> * call.D,
                    LinearBernoulliLogProbBackwardRows<compute_t, x_t, grad_t, with_log_prob>{
                        products.const_data_ptr<compute_t>(), call.bias.const_data_ptr<compute_t>(),
                        call.x.const_data_ptr<x_t>(),
                        call.upstream.defined() ? call.upstream.const_data_ptr<compute_t>() : nullptr,
                        call.log_prob.mutable_data_ptr<compute_t>(), grad_logits.mutable_data_ptr<grad_t>(),
                        sums.mutable_data_ptr<compute_t>(), call.rows, first, products.size(0), products.stride(0),
                        grad_logits.stride(0), call.D});
      };
      if constexpr (std::is_same_v<compute_t, float>) {
        if (grad_logits.scalar_type() != at::kFloat) {
          return dispatch_half(grad_logits.scalar_type(), launch_for);
        }
      }
      launch_for(type);
    });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(wakesleep_ext, CUDA, m) { LinearBernoulliOps<Kernels>::implement(m); }

}  // namespace wakesleep::cuda
