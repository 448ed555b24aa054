#include "../gaussian_log_prob.h"

#include "../densities.h"
#include "tiles.h"

namespace wakesleep::cpu {
namespace {

// Writes the gradients of one row. If several rows share the parameters, `summed` is true, the gradients of mu and
// logvar are added, and `inverse_sigma` has been computed. Otherwise, it is not read. The function also calls
// also_for(element, logvar, t) for every element.
template <bool summed, bool with_grad_z, typename compute_t, typename Body>
WAKESLEEP_INLINE void put_gradients(int64_t columns, compute_t upstream, const compute_t* mu, const compute_t* logvar,
                                    const compute_t* inverse_sigma, const compute_t* z, compute_t* grad_mu,
                                    compute_t* grad_logvar, compute_t* grad_z, const Body& also_for) {
  for_lanes<compute_t>(
      columns,
      [&](auto element, compute_t m, compute_t l, compute_t shared, compute_t v) {
        const GaussianTerm<compute_t> term(m, summed ? shared : gaussian_inverse_sigma(l), v);
        const compute_t of_mu = upstream * term.grad_mu();
        element.template put<summed>(grad_mu, of_mu);
        element.template put<summed>(grad_logvar, upstream * term.grad_logvar());
        if constexpr (with_grad_z) {
          element.store(grad_z, -of_mu);
        }
        also_for(element, l, term.standardized);
      },
      mu, logvar, inverse_sigma, z);
}

// The operands and the gradients of a call.
template <typename scalar_t>
struct GradientOperands {
  const scalar_t *mu, *logvar, *z;
  scalar_t* grad_z;  // null if not needed

  template <typename Call>
  explicit GradientOperands(const Call& call)
      : mu(static_cast<const scalar_t*>(call.mu)),
        logvar(static_cast<const scalar_t*>(call.logvar)),
        z(static_cast<const scalar_t*>(call.z)),
        grad_z(static_cast<scalar_t*>(call.grad_z)) {}

  // Writes the gradients of a piece of rows, for `columns` columns from `column` on. The gradients of mu and logvar go
  // to `to` and to + K. upstream_of(offset) returns the upstream gradient of a row. also_for is called as above, with
  // the row's upstream gradient as another argument.
  template <bool summed, typename grad_t, typename Upstream, typename Body>
  WAKESLEEP_INLINE void write(const RowGroups<5>& rows, const InnerPiece<5>& piece, int64_t K, int64_t column,
                              int64_t columns, grad_t* to, const Upstream& upstream_of, const Body& also_for) const {
    using compute_t = Compute<scalar_t>;
    auto *mu_out = to + column, *logvar_out = mu_out + K;
    Tile<compute_t> mu_tile, logvar_tile, inverse_sigma_tile, mu_result, logvar_result;
    const compute_t* m = mu_tile.read(mu + piece.offset.of[0] + column, columns);
    const compute_t* l = logvar_tile.read(logvar + piece.offset.of[1] + column, columns);
    const compute_t* inverse_sigma =
        summed ? inverse_sigma_tile.fill(columns, [](compute_t l) { return gaussian_inverse_sigma(l); }, l) : l;
    compute_t *grad_mu = mu_result.place_for(mu_out), *grad_logvar = logvar_result.place_for(logvar_out);
    if constexpr (summed) {
      std::fill_n(grad_mu, columns, compute_t(0));
      std::fill_n(grad_logvar, columns, compute_t(0));
    }
    for_inner_rows<summed>(rows, piece, [&](const auto& offset) {
      Tile<compute_t> z_tile, z_result;
      const compute_t* v = z_tile.read(z + offset.of[2] + column, columns);
      const compute_t upstream = upstream_of(offset);
      auto* z_out = grad_z == nullptr ? nullptr : grad_z + offset.of[4] + column;
      compute_t* row_z = z_result.place_for(z_out);
      const auto also = [&](auto element, compute_t log_variance, compute_t t) {
        also_for(element, log_variance, t, upstream);
      };
      if (z_out == nullptr) {
        put_gradients<summed, false>(columns, upstream, m, l, inverse_sigma, v, grad_mu, grad_logvar, row_z, also);
      } else {
        put_gradients<summed, true>(columns, upstream, m, l, inverse_sigma, v, grad_mu, grad_logvar, row_z, also);
        z_result.store(z_out, columns);
      }
    });
    mu_result.store(mu_out, columns);
    logvar_result.store(logvar_out, columns);
  }
};

}  // namespace

void compute(const GaussianLogProb& call, Stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = Compute<scalar_t>;
    const auto* mu = static_cast<const scalar_t*>(call.mu);
    const auto* logvar = static_cast<const scalar_t*>(call.logvar);
    const auto* z = static_cast<const scalar_t*>(call.z);
    auto* log_prob = static_cast<compute_t*>(call.log_prob);
    const auto term = [](compute_t m, compute_t l, compute_t inverse_sigma, compute_t v) {
      const compute_t t = GaussianTerm<compute_t>(m, inverse_sigma, v).standardized;
      return l + t * t;
    };
    const auto groups = group_by<2>(call.rows);  // the rows of a group share mu and logvar
    if (groups.inner.rows > 1 && call.K > 0 && call.K <= kTile) {
      for_inner_pieces(groups, call.K, [&](const auto& piece, int64_t, int64_t, int64_t K) {
        Tile<compute_t> mu_tile, logvar_tile, inverse_sigma_tile;
        const compute_t* m = mu_tile.read(mu + piece.offset.of[0], K);
        const compute_t* l = logvar_tile.read(logvar + piece.offset.of[1], K);
        const compute_t* inverse_sigma =
            inverse_sigma_tile.fill(K, [](compute_t l) { return gaussian_inverse_sigma(l); }, l);
        for_inner_rows<true>(groups, piece, [&](const auto& offset) {
          Tile<compute_t> z_tile;
          const compute_t* v = z_tile.read(z + offset.of[2], K);
          const compute_t sum = lane_sums<compute_t>(K, term, m, l, inverse_sigma, v).sum();
          log_prob[offset.of[3]] = gaussian_log_prob_of_sum(sum, K);
        });
      });
      return;
    }
    vectorized_parallel_for(call.rows.rows, grain_rows(call.K), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const auto offset = call.rows(row);
        const compute_t sum = sum_over_row<compute_t>(
            call.K, [&](compute_t m, compute_t l, compute_t v) { return term(m, l, gaussian_inverse_sigma(l), v); },
            mu + offset.of[0], logvar + offset.of[1], z + offset.of[2]);
        log_prob[row] = gaussian_log_prob_of_sum(sum, call.K);
      }
    });
  });
}

void compute(const GaussianLogProbBackward& call, Stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = Compute<scalar_t>;
    const GradientOperands<scalar_t> operands(call);
    const auto* grad = static_cast<const compute_t*>(call.grad);
    dispatch_sum<scalar_t>(call.parameters, [&](auto* to, auto summed) {
      for_inner_pieces(call.rows, call.K, [&](const auto& piece, int64_t index, int64_t column, int64_t columns) {
        operands.template write<summed>(
            call.rows, piece, call.K, column, columns, to + 2 * index * call.K,
            [&](const auto& offset) { return grad[offset.of[3]]; }, [](auto, compute_t, compute_t, compute_t) {});
      });
    });
  });
}

void compute(const GaussianLogProbAndGradients& call, Stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = Compute<scalar_t>;
    const GradientOperands<scalar_t> operands(call);
    const auto* upstream = static_cast<const compute_t*>(call.upstream);
    const auto scale = static_cast<compute_t>(call.scale);
    auto* sums = static_cast<compute_t*>(call.sums);
    const int64_t K = call.K, pieces = call.pieces(), pieces_of_part = call.pieces_of_part();
    dispatch_sum<scalar_t>(call.parameters, [&](auto* to, auto summed) {
      vectorized_parallel_for(call.parts(), 2, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
          Lanes<compute_t> sum(0);
          const int64_t last = std::min(pieces, (part + 1) * pieces_of_part);
          for (int64_t index = part * pieces_of_part; index < last; ++index) {
            const auto piece = inner_piece(call.rows, index);
            for_tiles(K, [&](int64_t column, int64_t columns) {
              operands.template write<summed>(
                  call.rows, piece, K, column, columns, to + 2 * index * K,
                  [&](const auto& offset) { return upstream == nullptr ? scale : scale * upstream[offset.of[3]]; },
                  [&](auto element, compute_t l, compute_t t, compute_t weight) {
                    element.add(sum, weight * (l + t * t + compute_t(kLogTwoPi)));
                  });
            });
          }
          sums[part] = compute_t(-0.5) * sum.sum();
        }
      });
    });
  });
}

}  // namespace wakesleep::cpu
