// Layers f(h weight^T + bias) and their gradients, on CUDA.
#include "../perceptron.h"

#include "rowwise.cuh"

namespace wakesleep::cuda {
namespace {

template <typename compute_t, typename scalar_t, typename F>
struct PerceptronRows {
  const compute_t* products;
  const compute_t* __restrict__ bias;
  scalar_t* output;  // may lie where the products do
  int64_t products_stride, output_stride;
  int64_t D;
  F activation;

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t row) const {
    const compute_t* product = products + row * products_stride;
    for_spans<kPacket<compute_t>>(team, D, 0, [&](auto span) {
      auto values = load<compute_t, Written>(span, product);
      const auto b = load<compute_t>(span, bias);
#pragma unroll
      for (int i = 0; i < span.size; ++i) {
        values.value[i] = activation(values.value[i] + b.value[i]);
      }
      store(span, values, output + row * output_stride);
    });
  }
};

// The gradient of the products, with its sum over the rows of each team, which takes them column by column.
template <typename compute_t, typename scalar_t, typename grad_t, typename F>
struct PerceptronBackwardRows {
  const scalar_t* grad;
  const scalar_t* __restrict__ output;
  grad_t* written;  // may lie where grad does
  compute_t* __restrict__ sums;
  int64_t count;  // of rows
  int64_t stride;
  int64_t D;
  F activation;

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t piece) const {
    constexpr int rows_at_once = kRowsOfSum<compute_t>;
    const int64_t row = piece * rows_at_once;
    for_spans<kPacket<scalar_t>>(team, D, 0, [&](auto span) {
      Packet<compute_t, span.size> total = {};
#pragma unroll
      for (int r = 0; r < rows_at_once; ++r) {
        if (row + r < count) {
          auto values = load<compute_t, Written>(span, grad + (row + r) * D);
          const auto y = load<compute_t>(span, output + (row + r) * D);
#pragma unroll
          for (int i = 0; i < span.size; ++i) {
            values.value[i] = activation.gradient(values.value[i], y.value[i]);
            total.value[i] += values.value[i];
          }
          store(span, values, written + (row + r) * stride);
        }
      }
      store(span, total, sums + piece * D);
    });
  }
};

struct Kernels {
  static int64_t rows_of_sum(at::ScalarType compute) { return cuda::rows_of_sum(compute); }

  static void write_output(const Perceptron& call, size_t l,
                           const at::Tensor& products,  // [rows, D]
                           const at::Tensor& output) {  // [rows, D]
    const Layer& layer = call.layers[l];
    call.dispatch(l, [&](auto activation, auto type) {
      using scalar_t = typename decltype(type)::type;
      using compute_t = at::opmath_type<scalar_t>;
      launch_rows(products.size(0), layer.D,
                  PerceptronRows<compute_t, scalar_t, decltype(activation)>{
                      products.const_data_ptr<compute_t>(), layer.bias.const_data_ptr<compute_t>(),
                      output.mutable_data_ptr<scalar_t>(), products.stride(0), output.stride(0), layer.D, activation});
    });
  }

  static void write_gradient(const Perceptron& call, size_t l,
                             const at::Tensor& grad,     // [rows, D]
                             const at::Tensor& output,   // [rows, D]
                             const at::Tensor& written,  // [rows, D]
                             const at::Tensor& sums) {   // [pieces, D]
    call.dispatch(l, [&](auto activation, auto type) {
      using scalar_t = typename decltype(type)::type;
      using compute_t = at::opmath_type<scalar_t>;
      const int64_t D = call.layers[l].D;
      const auto launch_for = [&](auto written_type) {
        using grad_t = typename decltype(written_type)::type;
        launch_rows(
            sums.size(0), kRowsOfSum<compute_t> * D,
            PerceptronBackwardRows<compute_t, scalar_t, grad_t, decltype(activation)>{
                grad.const_data_ptr<scalar_t>(), output.const_data_ptr<scalar_t>(), written.mutable_data_ptr<grad_t>(),
                sums.mutable_data_ptr<compute_t>(), grad.size(0), written.stride(0), D, activation});
      };
      written.scalar_type() == call.dtype ? launch_for(type) : launch_for(Type<compute_t>{});
    });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(wakesleep_ext, CUDA, m) { PerceptronOps<Kernels>::implement(m); }

}  // namespace wakesleep::cuda
