#include "../mlp.h"

#include "summed_rows.h"

namespace wakesleep::cpu {

void compute(const MlpOutput& call, Stream) {
  dispatch_activation_and_floating(call.activation, call.dtype, [&](auto activation, auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = Compute<scalar_t>;
    const auto* products = static_cast<const compute_t*>(call.products);
    const auto* bias = static_cast<const compute_t*>(call.bias);
    auto* output = static_cast<scalar_t*>(call.output);
    vectorized_parallel_for(call.rows, grain_rows(call.D), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for_tiles(call.D, [&](int64_t column, int64_t columns) {
          Tile<compute_t> tile;
          auto* out = output + row * call.output_stride + column;
          compute_t* written = tile.place_for(out);
          for_lanes<compute_t>(
              columns,
              [&](auto element, compute_t product, compute_t b) { element.store(written, activation(product + b)); },
              products + row * call.products_stride + column, bias + column);
          tile.store(out, columns);
        });
      }
    });
  });
}

void compute(const MlpGradient& call, Stream) {
  dispatch_activation_and_floating(call.activation, call.dtype, [&](auto activation, auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = Compute<scalar_t>;
    const auto* grad = static_cast<const scalar_t*>(call.grad);
    const auto* output = static_cast<const scalar_t*>(call.output);
    const int64_t D = call.D;
    const auto compute_to = [&](auto* written) {
      for_summed_rows(call.rows, D, static_cast<compute_t*>(call.sums), [&](int64_t row, compute_t* sum) {
        for_tiles(D, [&](int64_t column, int64_t columns) {
          Tile<compute_t> grad_tile, output_tile, tile;
          auto* to = written == nullptr ? nullptr : written + row * call.written_stride + column;
          compute_t* out = tile.place_for(to);
          const compute_t* upstream = grad_tile.read(grad + row * D + column, columns);
          constexpr bool is_identity = std::is_same_v<std::decay_t<decltype(activation)>, Identity>;
          const compute_t* y = is_identity ? upstream : output_tile.read(output + row * D + column, columns);
          for_lanes<compute_t>(
              columns,
              [&](auto element, compute_t of_output, compute_t y) {
                const compute_t gradient = activation.gradient(of_output, y);
                element.store(out, gradient);
                element.add(sum + column, gradient);
              },
              upstream, y);
          tile.store(to, columns);
        });
      });
    };
    call.written_dtype == call.dtype ? compute_to(static_cast<scalar_t*>(call.written))
                                     : compute_to(static_cast<compute_t*>(call.written));
  });
}

}  // namespace wakesleep::cpu
