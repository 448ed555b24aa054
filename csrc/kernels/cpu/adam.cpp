// One parallel loop over the elements of all tensors.
#include "../adam.h"

#include "tiles.h"

namespace wakesleep::cpu {
namespace {

template <typename compute_t, typename scalar_t>
WAKESLEEP_INLINE void descend(const AdamStep<compute_t>& step, int64_t count, scalar_t* parameter,
                              const scalar_t* gradient, scalar_t* exp_avg, scalar_t* exp_avg_sq) {
  Tile<compute_t> parameter_tile, gradient_tile, exp_avg_tile, exp_avg_sq_tile;
  compute_t* const new_parameter = parameter_tile.place_for(parameter);
  compute_t* const new_exp_avg = exp_avg_tile.place_for(exp_avg);
  compute_t* const new_exp_avg_sq = exp_avg_sq_tile.place_for(exp_avg_sq);
  for_lanes<compute_t>(
      count,
      [&](auto element, compute_t p, compute_t g, compute_t m, compute_t v) {
        step(g, p, m, v);
        element.store(new_parameter, p);
        element.store(new_exp_avg, m);
        element.store(new_exp_avg_sq, v);
      },
      parameter_tile.read(parameter, count), gradient_tile.read(gradient, count), exp_avg_tile.read(exp_avg, count),
      exp_avg_sq_tile.read(exp_avg_sq, count));
  parameter_tile.store(parameter, count);
  exp_avg_tile.store(exp_avg, count);
  exp_avg_sq_tile.store(exp_avg_sq, count);
}

}  // namespace

void compute(const Adam& call, Stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    const auto tensors = divide<scalar_t, kTile>(call);
    const auto common = call.rule.read<Compute<scalar_t>>();
    vectorized_parallel_for(tensors.back().end(), grain_rows(kTile), [&](int64_t begin, int64_t end) {
      const auto* tensor = tensors.data();
      for (int64_t piece = begin; piece < end; ++piece) {
        while (piece >= tensor->end()) {
          ++tensor;
        }
        const int64_t at = (piece - tensor->first) * kTile;
        descend(common, std::min(kTile, tensor->size - at), tensor->parameter + at, tensor->gradient + at,
                tensor->exp_avg + at, tensor->exp_avg_sq + at);
      }
    });
  });
}

}  // namespace wakesleep::cpu
