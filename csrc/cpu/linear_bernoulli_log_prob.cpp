// log p(x; h weight^T + bias) and its gradients, on the CPU, a chunk of rows at a time.
#include "../linear_bernoulli.h"
#include "bernoulli_rows.h"
#include "products.h"
#include "summed_rows.h"

namespace wakesleep::cpu {
namespace {

struct Kernels : Products {
  static int64_t rows_of_sum(at::ScalarType) { return kPieceRows; }

  static void write_log_prob(const LinearBernoulliLogProb& call, int64_t first,
                             const at::Tensor& products) {  // [rows, D]
    call.dispatch([&](auto type, auto x_type) {
      using compute_t = typename decltype(type)::type;
      using x_t = typename decltype(x_type)::type;
      const auto* products_data = products.const_data_ptr<compute_t>();
      const auto* bias = call.bias.const_data_ptr<compute_t>();
      const auto* x_data = call.x.const_data_ptr<x_t>();
      auto* log_prob = call.log_prob.mutable_data_ptr<compute_t>() + first;
      vectorized_parallel_for(products.size(0), grain_rows(call.D), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const ProductAndBias<compute_t> logits = {products_data + row * products.stride(0), bias};
          log_prob[row] = row_log_prob<compute_t>(call.D, logits, x_data + call.rows(first + row).of[0]);
        }
      });
    });
  }

  // Writes the gradient of a chunk's logits, and one sum for every kPieceRows rows of this gradient. grad_logits may
  // alias products. If with_log_prob is true, the function also writes the log-likelihoods, which are computed from the
  // same exponentials.
  template <bool with_log_prob>
  static void write_gradient(const LinearBernoulliGradients& call, int64_t first,
                             const at::Tensor& products,     // [rows, D]
                             const at::Tensor& grad_logits,  // [rows, D]
                             const at::Tensor& sums) {       // [pieces, D]
    call.dispatch([&](auto type, auto x_type) {
      using compute_t = typename decltype(type)::type;
      using x_t = typename decltype(x_type)::type;
      const auto* products_data = products.const_data_ptr<compute_t>();
      const auto* bias = call.bias.const_data_ptr<compute_t>();
      const auto* x_data = call.x.const_data_ptr<x_t>();
      const auto* upstream = call.upstream.defined() ? call.upstream.const_data_ptr<compute_t>() : nullptr;
      auto* log_prob = call.log_prob.mutable_data_ptr<compute_t>() + first;
      auto* grad_data = grad_logits.mutable_data_ptr<compute_t>();
      const int64_t D = call.D;
      for_summed_rows(products.size(0), D, sums.mutable_data_ptr<compute_t>(), [&](int64_t row, compute_t* sum) {
        const auto offset = call.rows(first + row);
        const ProductAndBias<compute_t> logits = {products_data + row * products.stride(0), bias};
        const auto* x = x_data + offset.of[0];
        const compute_t weight = upstream != nullptr ? upstream[offset.of[1]] : compute_t(1);
        auto* grad = grad_data + row * grad_logits.stride(0);
        const auto write = [&](auto element, compute_t a, compute_t v) {
          const compute_t gradient = weight * bernoulli_grad_logits(a, v);
          element.store(grad, gradient);
          element.add(sum, gradient);
        };
        if constexpr (with_log_prob) {
          log_prob[row] = row_log_prob<compute_t>(D, logits, x, write);
        } else {
          for_tiles(D, [&](int64_t column, int64_t columns) {
            Tile<compute_t> logits_tile, x_tile;
            for_lanes<compute_t>(
                columns, [&](auto element, compute_t a, compute_t v) { write(element.after(column), a, v); },
                logits(logits_tile, column, columns), x_tile.read(x + column, columns));
          });
        }
      });
    });
  }
};

}  // namespace

WAKESLEEP_KERNELS(CPU, m) { LinearBernoulliOps<Kernels>::implement(m); }

}  // namespace wakesleep::cpu
