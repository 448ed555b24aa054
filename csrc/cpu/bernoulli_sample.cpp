// x ~ Bernoulli(s(logits)): x = [u <= s(a)] for a uniform u in (0, 1], on the CPU.
#include <torch/library.h>

#include "../bernoulli.h"
#include "../densities.h"
#include "draw.h"

namespace wakesleep::cpu {
namespace {

at::Tensor bernoulli_sample(const at::Tensor& logits,  // [*B, D]
                            const at::Tensor& key,     // [2]
                            at::IntArrayRef sample_shape, std::optional<at::ScalarType> dtype) {
  const BernoulliSample call(logits, key, sample_shape, dtype);
  call.dispatch([&](auto logit_type, auto x_type) {
    using logit_t = typename decltype(logit_type)::type;
    using x_t = typename decltype(x_type)::type;
    using compute_t = at::opmath_type<logit_t>;
    const auto* logits_data = call.logits.const_data_ptr<logit_t>();
    auto* x_data = call.x.mutable_data_ptr<x_t>();
    const PhiloxKey key_words = read_key(call.key);
    for_row_tiles(1, call.samples * call.rows.rows, call.D, [&](int64_t, int64_t first_row, int64_t rows) {
      DrawTile<Uniforms, compute_t> tile;
      for_tiles(call.D, [&](int64_t column, int64_t columns) {
        const compute_t* u = tile.fill(key_words, first_row * call.D + column, rows * columns);
        for (int64_t row = first_row; row < first_row + rows; ++row, u += columns) {
          Tile<compute_t> logits_tile, x_tile;
          const compute_t* a = logits_tile.read(logits_data + call.rows(row % call.rows.rows).of[0] + column, columns);
          auto* out = x_data + row * call.D + column;
          compute_t* x = x_tile.place_for(out);
          for_lanes<compute_t>(0, columns, [&](int64_t d, int) { x[d] = u[d] <= sigmoid(a[d]) ? 1 : 0; });
          x_tile.store(out, columns);
        }
      });
    });
  });
  return call.result();
}

}  // namespace

TORCH_LIBRARY_IMPL(wakesleep_ext, CPU, m) { m.impl("bernoulli_sample", bernoulli_sample); }

}  // namespace wakesleep::cpu
