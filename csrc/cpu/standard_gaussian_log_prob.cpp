// log N(z; 0, I) = -1/2 sum_k [z^2 + log 2 pi] and its gradient, -z, on the CPU.
#include "../densities.h"
#include "../gaussian.h"
#include "../registration.h"
#include "vec.h"

namespace wakesleep::cpu {
namespace {

at::Tensor standard_gaussian_log_prob(const at::Tensor& z) {  // [*B, K]
  const StandardGaussianLogProb call(z);
  dispatch_floating(call.op, call.z.scalar_type(), [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = at::opmath_type<scalar_t>;
    const auto* z_data = call.z.const_data_ptr<scalar_t>();
    auto* log_prob = call.log_prob.mutable_data_ptr<compute_t>();
    vectorized_parallel_for(call.rows.rows, grain_rows(call.K), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const compute_t sum =
            sum_over_row<compute_t>(call.K, [](compute_t v) { return v * v; }, z_data + call.rows(row).of[0]);
        log_prob[row] = gaussian_log_prob_of_sum(sum, call.K);
      }
    });
  });
  return call.log_prob;
}

at::Tensor standard_gaussian_log_prob_backward(const at::Tensor& grad,  // [*B]
                                               const at::Tensor& z) {   // [*B, K]
  const StandardGaussianLogProbBackward call(grad, z);
  dispatch_floating(call.op, call.z.scalar_type(), [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = at::opmath_type<scalar_t>;
    const auto* z_data = call.z.const_data_ptr<scalar_t>();
    const auto* grad_data = call.grad.const_data_ptr<compute_t>();
    auto* grad_z = call.grad_z.mutable_data_ptr<scalar_t>();
    vectorized_parallel_for(call.rows.rows, grain_rows(call.K), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const auto offset = call.rows(row);
        const compute_t upstream = grad_data[offset.of[1]];
        for_tiles(call.K, [&](int64_t column, int64_t columns) {
          Tile<compute_t> z_tile, result_tile;
          const compute_t* v = z_tile.read(z_data + offset.of[0] + column, columns);
          auto* out = grad_z + row * call.K + column;
          compute_t* result = result_tile.place_for(out);
          for_lanes<compute_t>(
              columns, [&](auto element, compute_t value) { element.store(result, -upstream * value); }, v);
          result_tile.store(out, columns);
        });
      }
    });
  });
  return call.grad_z;
}

}  // namespace

WAKESLEEP_KERNELS(CPU, m) {
  m.impl("standard_gaussian_log_prob", standard_gaussian_log_prob);
  m.impl("standard_gaussian_log_prob_backward", standard_gaussian_log_prob_backward);
}

}  // namespace wakesleep::cpu
