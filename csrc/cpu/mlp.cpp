// Layers f(h weight^T + bias) and their gradients, on the CPU.
#include "../mlp.h"

#include "products.h"
#include "summed_rows.h"

namespace wakesleep::cpu {
namespace {

struct Kernels : Products {
  static int64_t rows_of_sum(at::ScalarType) { return kPieceRows; }

  static void write_output(const Mlp& call, size_t l,
                           const at::Tensor& products,  // [rows, D]
                           const at::Tensor& output) {  // [rows, D]
    const Layer& layer = call.layers[l];
    call.dispatch(l, [&](auto activation, auto type) {
      using scalar_t = typename decltype(type)::type;
      using compute_t = at::opmath_type<scalar_t>;
      const auto* products_data = products.const_data_ptr<compute_t>();
      const auto* bias = layer.bias.const_data_ptr<compute_t>();
      auto* output_data = output.mutable_data_ptr<scalar_t>();
      vectorized_parallel_for(products.size(0), grain_rows(layer.D), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          for_tiles(layer.D, [&](int64_t column, int64_t columns) {
            Tile<compute_t> tile;
            auto* out = output_data + row * output.stride(0) + column;
            compute_t* written = tile.place_for(out);
            for_lanes<compute_t>(
                columns,
                [&](auto element, compute_t product, compute_t b) { element.store(written, activation(product + b)); },
                products_data + row * products.stride(0) + column, bias + column);
            tile.store(out, columns);
          });
        }
      });
    });
  }

  static void write_gradient(const Mlp& call, size_t l,
                             const at::Tensor& grad,     // [rows, D]
                             const at::Tensor& output,   // [rows, D]
                             const at::Tensor& written,  // [rows, D]
                             const at::Tensor& sums) {   // [pieces, D]
    call.dispatch(l, [&](auto activation, auto type) {
      using scalar_t = typename decltype(type)::type;
      using compute_t = at::opmath_type<scalar_t>;
      const auto* grad_data = grad.const_data_ptr<scalar_t>();
      const auto* output_data = output.const_data_ptr<scalar_t>();
      auto* written_data = written.mutable_data_ptr<compute_t>();
      const int64_t D = call.layers[l].D;
      for_summed_rows(grad.size(0), D, sums.mutable_data_ptr<compute_t>(), [&](int64_t row, compute_t* sum) {
        for_tiles(D, [&](int64_t column, int64_t columns) {
          Tile<compute_t> grad_tile, output_tile;
          auto* out = written_data + row * written.stride(0) + column;
          for_lanes<compute_t>(
              columns,
              [&](auto element, compute_t upstream, compute_t y) {
                const compute_t gradient = activation.gradient(upstream, y);
                element.store(out, gradient);
                element.add(sum + column, gradient);
              },
              grad_tile.read(grad_data + row * D + column, columns),
              output_tile.read(output_data + row * D + column, columns));
        });
      });
    });
  }
};

}  // namespace

WAKESLEEP_KERNELS(CPU, m) { MlpOps<Kernels>::implement(m); }

}  // namespace wakesleep::cpu
