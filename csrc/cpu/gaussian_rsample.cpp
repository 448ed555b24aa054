// z = mu + sigma eps with sigma = e^(logvar/2), log q(z) = -1/2 sum_k [logvar + eps^2 + log 2 pi], and the gradients of
// both, on the CPU. eps is a function of the key and the element's index in z, so the backward pass recomputes the same
// eps.
#include "../densities.h"
#include "../gaussian.h"
#include "../registration.h"
#include "draw.h"

namespace wakesleep::cpu {
namespace {

template <bool with_log_prob>
void draw(const GaussianRsample& call) {
  dispatch_floating(call.op, call.dtype(), [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = at::opmath_type<scalar_t>;
    const auto* mu_data = call.mu.const_data_ptr<scalar_t>();
    const auto* logvar_data = call.logvar.const_data_ptr<scalar_t>();
    auto* z_data = call.z.mutable_data_ptr<scalar_t>();
    auto* log_prob = with_log_prob ? call.log_prob.mutable_data_ptr<compute_t>() : nullptr;
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
          const compute_t* m = mu_tile.read(mu_data + offset.of[0] + column, columns);
          const compute_t* l = logvar_tile.read(logvar_data + offset.of[1] + column, columns);
          auto* out = z_data + row * call.K + column;
          compute_t* z = z_tile.place_for(out);
          for_lanes<compute_t>(
              columns,
              [&](auto element, compute_t mean, compute_t log_variance, compute_t noise) {
                element.store(z, mean + gaussian_sigma(log_variance) * noise);
              },
              m, l, eps);
          if (column == 0) {
            sum.fill(0);
          }
          if constexpr (with_log_prob) {
            sum += lane_sums<compute_t>(
                columns, [](compute_t log_variance, compute_t noise) { return log_variance + noise * noise; }, l, eps);
          }
          z_tile.store(out, columns);
          if (with_log_prob && column + columns == call.K) {
            log_prob[row] = gaussian_log_prob_of_sum(sum.sum(), call.K);
          }
        }
      }
    });
  });
}

at::Tensor gaussian_rsample(const at::Tensor& mu,      // [*B, K]
                            const at::Tensor& logvar,  // [*B, K]
                            const at::Tensor& key,     // [2]
                            at::IntArrayRef sample_shape) {
  const GaussianRsample call("gaussian_rsample", mu, logvar, key, sample_shape, false);
  draw<false>(call);
  return call.z;
}

std::tuple<at::Tensor, at::Tensor> gaussian_rsample_log_prob(const at::Tensor& mu,      // [*B, K]
                                                             const at::Tensor& logvar,  // [*B, K]
                                                             const at::Tensor& key,     // [2]
                                                             at::IntArrayRef sample_shape) {
  const GaussianRsample call("gaussian_rsample_log_prob", mu, logvar, key, sample_shape, true);
  draw<true>(call);
  return {call.z, call.log_prob};
}

// grad_mu = sum_s grad_z; grad_logvar = 1/2 sum_s (grad_z sigma eps - grad_log_prob).
at::Tensor gaussian_rsample_backward(const std::optional<at::Tensor>& grad_z,         // [*S, *B, K]
                                     const std::optional<at::Tensor>& grad_log_prob,  // [*S, *B]
                                     const at::Tensor& mu,                            // [*B, K]
                                     const at::Tensor& logvar,                        // [*B, K]
                                     const at::Tensor& key,                           // [2]
                                     at::IntArrayRef sample_shape) {
  const GaussianRsampleBackward call(grad_z, grad_log_prob, mu, logvar, key, sample_shape);
  dispatch_floating(call.op, call.dtype(), [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = at::opmath_type<scalar_t>;
    const auto* logvar_data = call.logvar.const_data_ptr<scalar_t>();
    const auto* grad_z_data = call.grad_z.defined() ? call.grad_z.const_data_ptr<scalar_t>() : nullptr;
    const auto* grad_log_prob_data =
        call.grad_log_prob.defined() ? call.grad_log_prob.const_data_ptr<compute_t>() : nullptr;
    const PhiloxKey key_words = read_key(call.key);
    const int64_t B = call.rows.rows, K = call.K;
    dispatch_sum<scalar_t>(call.grad, [&](auto* to, auto) {
      for_row_tiles(inner_pieces(call.samples), B, K, [&](int64_t piece, int64_t first_row, int64_t rows) {
        DrawTile<StandardNormals, compute_t> tile;
        const int64_t first_sample = piece * kPieceRows;
        const int64_t last_sample = std::min(call.samples, first_sample + kPieceRows);
        for (int64_t column = 0; column < K; column += kTile) {
          const int64_t columns = std::min(kTile, K - column);
          compute_t total_z[kTile] = {}, total_z_eps[kTile] = {};  // sums over `rows` rows
          if (grad_z_data != nullptr) {
            for (int64_t sample = first_sample; sample < last_sample; ++sample) {
              const int64_t first = (sample * B + first_row) * K + column;
              const compute_t* eps = tile.fill(key_words, first, rows * columns);
              Tile<compute_t> grad_tile;
              const compute_t* upstream = grad_tile.read(grad_z_data + first, rows * columns);
              for_lanes<compute_t>(
                  rows * columns,
                  [&](auto element, compute_t grad, compute_t noise) {
                    element.add(total_z, grad);
                    element.add(total_z_eps, grad * noise);
                  },
                  upstream, eps);
            }
          }
          for (int64_t row = first_row; row < first_row + rows; ++row) {
            compute_t total_log_prob = 0;
            for (int64_t sample = first_sample; grad_log_prob_data != nullptr && sample < last_sample; ++sample) {
              total_log_prob += grad_log_prob_data[sample * B + row];
            }
            Tile<compute_t> logvar_tile, mu_result, logvar_result;
            const compute_t* l = logvar_tile.read(logvar_data + call.rows(row).of[0] + column, columns);
            const int64_t in_tile = (row - first_row) * columns;
            auto *mu_out = to + 2 * (piece * B + row) * K + column, *logvar_out = mu_out + K;
            compute_t *grad_mu = mu_result.place_for(mu_out), *grad_logvar = logvar_result.place_for(logvar_out);
            for_lanes<compute_t>(
                columns,
                [&](auto element, compute_t log_variance, compute_t of_z, compute_t of_z_eps) {
                  element.store(grad_mu, of_z);
                  const compute_t of_sigma = gaussian_sigma(log_variance) * of_z_eps;
                  element.store(grad_logvar, compute_t(0.5) * (of_sigma - total_log_prob));
                },
                l, total_z + in_tile, total_z_eps + in_tile);
            mu_result.store(mu_out, columns);
            logvar_result.store(logvar_out, columns);
          }
        }
      });
    });
  });
  return call.grad.total();
}

}  // namespace

WAKESLEEP_KERNELS(CPU, m) {
  m.impl("gaussian_rsample", gaussian_rsample);
  m.impl("gaussian_rsample_log_prob", gaussian_rsample_log_prob);
  m.impl("gaussian_rsample_backward", gaussian_rsample_backward);
}

}  // namespace wakesleep::cpu
