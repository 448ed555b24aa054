#include "../standard_gaussian_log_prob.h"

#include "../densities.h"
#include "tiles.h"

namespace wakesleep::cpu {

void compute(const StandardGaussianLogProb& call, Stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = Compute<scalar_t>;
    const auto* z = static_cast<const scalar_t*>(call.z);
    auto* log_prob = static_cast<compute_t*>(call.log_prob);
    vectorized_parallel_for(call.rows.rows, grain_rows(call.K), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const compute_t sum =
            sum_over_row<compute_t>(call.K, [](compute_t v) { return v * v; }, z + call.rows(row).of[0]);
        log_prob[row] = gaussian_log_prob_of_sum(sum, call.K);
      }
    });
  });
}

void compute(const StandardGaussianLogProbBackward& call, Stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = Compute<scalar_t>;
    const auto* z = static_cast<const scalar_t*>(call.z);
    const auto* grad = static_cast<const compute_t*>(call.grad);
    auto* grad_z = static_cast<scalar_t*>(call.grad_z);
    vectorized_parallel_for(call.rows.rows, grain_rows(call.K), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const auto offset = call.rows(row);
        const compute_t upstream = grad[offset.of[1]];
        for_tiles(call.K, [&](int64_t column, int64_t columns) {
          Tile<compute_t> z_tile, z_result;
          const compute_t* v = z_tile.read(z + offset.of[0] + column, columns);
          auto* z_out = grad_z + row * call.K + column;
          compute_t* row_z = z_result.place_for(z_out);
          for_lanes<compute_t>(
              columns, [&](auto element, compute_t value) { element.store(row_z, -upstream * value); }, v);
          z_result.store(z_out, columns);
        });
      }
    });
  });
}

}  // namespace wakesleep::cpu
