// Layers f(h weight^T + bias) and their gradients, on CUDA.
#include "../mlp.h"

#include "small_batch.cuh"

namespace wakesleep::cuda {
namespace {

template <typename compute_t, typename scalar_t, typename F>
struct MlpRows {
  const compute_t* products;
  const compute_t* __restrict__ bias;
  scalar_t* output;  // may alias products
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

// Writes the gradient of the products h weight^T. row_kernel uses this struct to process rows separately.
// summed_rows_kernel also sums the gradient over rows.
template <typename compute_t, typename scalar_t, typename grad_t, typename F>
struct MlpBackwardRows {
  static constexpr int kSpan = kPacket<scalar_t>;
  const scalar_t* grad;
  const scalar_t* __restrict__ output;
  grad_t* written;  // may alias grad
  int64_t stride;   // row stride of written
  int64_t D;
  F activation;

  struct Read {
    Packet<compute_t, kSpan> upstream, y;
  };

  template <typename Span>
  __device__ Read read(int64_t row, Span span) const {
    return {load<compute_t, Written>(span, grad + row * D), load<compute_t>(span, output + row * D)};
  }

  template <typename Span>
  __device__ auto make(int64_t row, Span span, const Read& of) const {
    Packet<compute_t, kSpan> values;
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      values.value[i] = activation.gradient(of.upstream.value[i], of.y.value[i]);
    }
    store(span, values, written + row * stride);
    return values;
  }

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t row) const {
    for_spans<kSpan>(team, D, 0, [&](auto span) { make(row, span, read(row, span)); });
  }

  struct RowsOfWarp {
    int64_t first;
    int last;
  };

  __device__ RowsOfWarp begin(int64_t first, int held) const { return {first, held > 0 ? held - 1 : 0}; }
  template <typename Span>
  __device__ Read read(RowsOfWarp kept, int r, Span span) const {
    return read(kept.first + min(r, kept.last), span);
  }
  template <typename Span>
  __device__ auto make(RowsOfWarp kept, int r, Span span, const Read& of) const {
    return make(kept.first + r, span, of);
  }
  __device__ void end(RowsOfWarp) const {}
};

template <typename compute_t, typename scalar_t, typename F>
struct WriteOutput {
  const compute_t* __restrict__ bias;
  scalar_t* __restrict__ output;
  int64_t D;
  F activation;

  __device__ void operator()(int64_t row, int64_t column, compute_t product) const {
    output[row * D + column] = static_cast<scalar_t>(activation(product + bias[column]));
  }
};

struct Kernels : PlatformProducts {
  static constexpr bool kOwnSmallBatches = true;
  static int64_t small_batch_limit() { return cuda::small_batch_limit(); }
  static int64_t rows_of_sum(at::ScalarType compute) { return cuda::rows_of_sum(compute); }

  static void write_output(const Mlp& call, size_t l,
                           const at::Tensor& products,  // [rows, D]
                           const at::Tensor& output) {  // [rows, D]
    const Layer& layer = call.layers[l];
    call.dispatch(l, [&](auto activation, auto type) {
      using scalar_t = typename decltype(type)::type;
      using compute_t = at::opmath_type<scalar_t>;
      launch_rows(products.size(0), layer.D,
                  MlpRows<compute_t, scalar_t, decltype(activation)>{
                      products.const_data_ptr<compute_t>(), layer.bias.const_data_ptr<compute_t>(),
                      output.mutable_data_ptr<scalar_t>(), products.stride(0), output.stride(0), layer.D, activation});
    });
  }

  static void write_gradient(const Mlp& call, size_t l,
                             const at::Tensor& grad,     // [rows, D]
                             const at::Tensor& output,   // [rows, D]
                             const at::Tensor& written,  // [rows, D]
                             const at::Tensor& sums) {   // [pieces, D], or undefined
    call.dispatch(l, [&](auto activation, auto type) {
      using scalar_t = typename decltype(type)::type;
      using compute_t = at::opmath_type<scalar_t>;
      const int64_t N = grad.size(0), D = call.layers[l].D;
      const auto launch_for = [&](auto written_type) {
        using grad_t = typename decltype(written_type)::type;
        using Rows = MlpBackwardRows<compute_t, scalar_t, grad_t, decltype(activation)>;
        const Rows rows = {grad.const_data_ptr<scalar_t>(),
                           output.const_data_ptr<scalar_t>(),
                           written.mutable_data_ptr<grad_t>(),
                           written.stride(0),
                           D,
                           activation};
        if (sums.defined()) {
          launch_summed_rows(rows, sums.mutable_data_ptr<compute_t>(), N, D);
        } else {  // a small batch uses one block per row
          launch_teams(Team<kBlockThreads>{}, N, rows);
        }
      };
      written.scalar_type() == call.dtype ? launch_for(type) : launch_for(Type<compute_t>{});
    });
  }

  static at::Tensor small_batch_output(const Mlp& call, size_t l, const at::Tensor& h) {  // [N, H]
    const Layer& layer = call.layers[l];
    const FewRows operands(h, layer.weight, call.dtype);
    at::Tensor output = aten::empty({h.size(0), layer.D}, operands.h.options());
    call.dispatch(l, [&](auto activation, auto type) {
      using scalar_t = typename decltype(type)::type;
      using compute_t = at::opmath_type<scalar_t>;
      launch_layer<scalar_t>(operands, WriteOutput<compute_t, scalar_t, decltype(activation)>{
                                           layer.bias.const_data_ptr<compute_t>(), output.mutable_data_ptr<scalar_t>(),
                                           layer.D, activation});
    });
    return output;
  }

  static at::Tensor small_batch_gradient(const Mlp& call,
                                         const at::Tensor& grad,      // [N, D]
                                         const at::Tensor& output) {  // [N, D]
    const at::Tensor upstream = grad.contiguous();
    if (std::holds_alternative<Identity>(call.output_activation)) {
      return upstream;
    }
    const at::Tensor written = aten::empty_like(upstream);
    write_gradient(call, call.last(), upstream, output.contiguous(), written, at::Tensor());
    return written;
  }

  static void small_batch_gradients(const Mlp& call, size_t l,
                                    const at::Tensor& h,            // [N, H]
                                    const at::Tensor& grad,         // [N, D]
                                    const at::Tensor& grad_weight,  // [D, H]
                                    const at::Tensor& grad_bias,    // [D]
                                    const at::Tensor& grad_h) {     // [N, H]
    const FewRows operands(h, call.layers[l].weight, call.dtype);
    const auto launch_for = [&](auto activation, auto type) {
      using scalar_t = typename decltype(type)::type;
      launch_layer_gradients<scalar_t>(operands, grad, grad_weight, grad_bias, grad_h, activation);
    };
    if (l == 0) {  // h is the input of the MLP, not the output of an activation
      return dispatch_floating(call.op, call.dtype, [&](auto type) { launch_for(Identity{}, type); });
    }
    call.dispatch(l - 1, launch_for);
  }
};

}  // namespace

WAKESLEEP_KERNELS(CUDA, m) { MlpOps<Kernels>::implement(m); }

}  // namespace wakesleep::cuda
