#include "../gaussian_rsample.h"

#include "../densities.h"
#include "draw.h"

namespace wakesleep::cpu {
namespace {

template <bool with_log_prob>
void draw(const GaussianRsample& call) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = Compute<scalar_t>;
    const auto* mu = static_cast<const scalar_t*>(call.mu);
    const auto* logvar = static_cast<const scalar_t*>(call.logvar);
    auto* z = static_cast<scalar_t*>(call.z);
    auto* log_prob = static_cast<compute_t*>(call.log_prob);
    const PhiloxKey key = read_key(call.key);
    for_row_tiles(1, call.samples * call.rows.rows, call.K, [&](int64_t, int64_t first_row, int64_t rows) {
      DrawTile<StandardNormals, compute_t> tile;
      Lanes<compute_t> sum(0);
      for (int64_t column = 0; column == 0 || column < call.K; column += kTile) {
        const int64_t columns = std::min(kTile, call.K - column);
        const compute_t* eps = tile.fill(key, first_row * call.K + column, rows * columns);
        for (int64_t row = first_row; row < first_row + rows; ++row, eps += columns) {
          const auto offset = call.rows(row % call.rows.rows);
          Tile<compute_t> mu_tile, logvar_tile, z_tile;
          const compute_t* m = mu_tile.read(mu + offset.of[0] + column, columns);
          const compute_t* l = logvar_tile.read(logvar + offset.of[1] + column, columns);
          auto* z_out = z + row * call.K + column;
          compute_t* row_z = z_tile.place_for(z_out);
          for_lanes<compute_t>(
              columns,
              [&](auto element, compute_t mean, compute_t log_variance, compute_t noise) {
                element.store(row_z, mean + gaussian_sigma(log_variance) * noise);
              },
              m, l, eps);
          if (column == 0) {
            sum.fill(0);
          }
          if constexpr (with_log_prob) {
            sum += lane_sums<compute_t>(
                columns, [](compute_t log_variance, compute_t noise) { return log_variance + noise * noise; }, l, eps);
          }
          z_tile.store(z_out, columns);
          if (with_log_prob && column + columns == call.K) {
            log_prob[row] = gaussian_log_prob_of_sum(sum.sum(), call.K);
          }
        }
      }
    });
  });
}

// Sums over samples for a tile of rows.
template <typename compute_t>
struct SampleSums {
  compute_t grad_z[kTile] = {}, grad_z_eps[kTile] = {};

  template <typename scalar_t>
  WAKESLEEP_INLINE void add(int64_t count, const scalar_t* sample_grad_z, const compute_t* eps) {
    Tile<compute_t> grad_tile;
    const compute_t* upstream = grad_tile.read(sample_grad_z, count);
    for_lanes<compute_t>(
        count,
        [&](auto element, compute_t grad, compute_t noise) {
          element.add(grad_z, grad);
          element.add(grad_z_eps, grad * noise);
        },
        upstream, eps);
  }
};

// Writes the gradients of one row, given its sums over samples.
template <typename scalar_t, typename compute_t, typename grad_t>
WAKESLEEP_INLINE void write_gradients(int64_t columns, const scalar_t* logvar, const compute_t* sum_z,
                                      const compute_t* sum_z_eps, compute_t sum_log_prob, grad_t* mu_out,
                                      grad_t* logvar_out) {
  Tile<compute_t> logvar_tile, mu_result, logvar_result;
  const compute_t* l = logvar_tile.read(logvar, columns);
  compute_t *grad_mu = mu_result.place_for(mu_out), *grad_logvar = logvar_result.place_for(logvar_out);
  for_lanes<compute_t>(
      columns,
      [&](auto element, compute_t log_variance, compute_t of_z, compute_t of_z_eps) {
        element.store(grad_mu, of_z);
        const compute_t of_sigma = gaussian_sigma(log_variance) * of_z_eps;
        element.store(grad_logvar, compute_t(0.5) * (of_sigma - sum_log_prob));
      },
      l, sum_z, sum_z_eps);
  mu_result.store(mu_out, columns);
  logvar_result.store(logvar_out, columns);
}

}  // namespace

void compute(const GaussianRsample& call, Stream) { call.log_prob == nullptr ? draw<false>(call) : draw<true>(call); }

void compute(const GaussianRsampleBackward& call, Stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = Compute<scalar_t>;
    const auto* grad_z = static_cast<const scalar_t*>(call.grad_z);
    const auto* grad_log_prob = static_cast<const compute_t*>(call.grad_log_prob);
    const auto* logvar = static_cast<const scalar_t*>(call.logvar);
    const PhiloxKey key = read_key(call.key);
    const int64_t B = call.rows.rows, K = call.K;
    dispatch_sum<scalar_t>(call.parameters, [&](auto* to, auto) {
      for_row_tiles(inner_pieces(call.samples), B, K, [&](int64_t piece, int64_t first_row, int64_t rows) {
        DrawTile<StandardNormals, compute_t> tile;
        const int64_t first_sample = piece * kPieceRows;
        const int64_t last_sample = std::min(call.samples, first_sample + kPieceRows);
        for (int64_t column = 0; column < K; column += kTile) {
          const int64_t columns = std::min(kTile, K - column);
          SampleSums<compute_t> sums;
          for (int64_t sample = first_sample; grad_z != nullptr && sample < last_sample; ++sample) {
            const int64_t first = (sample * B + first_row) * K + column;
            sums.add(rows * columns, grad_z + first, tile.fill(key, first, rows * columns));
          }
          for (int64_t row = first_row; row < first_row + rows; ++row) {
            compute_t sum_log_prob = 0;
            for (int64_t sample = first_sample; grad_log_prob != nullptr && sample < last_sample; ++sample) {
              sum_log_prob += grad_log_prob[sample * B + row];
            }
            const int64_t in_tile = (row - first_row) * columns;
            auto *mu_out = to + 2 * (piece * B + row) * K + column, *logvar_out = mu_out + K;
            write_gradients(columns, logvar + call.rows(row).of[0] + column, sums.grad_z + in_tile,
                            sums.grad_z_eps + in_tile, sum_log_prob, mu_out, logvar_out);
          }
        }
      });
    });
  });
}

}  // namespace wakesleep::cpu
