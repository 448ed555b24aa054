#include "../mlp.h"

#include "column_sums.cuh"

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
  grad_t* written;  // may alias grad, or be null
  int64_t stride;   // row stride of written
  int64_t D;
  F activation;

  using Row = int64_t;

  struct Read {
    Packet<compute_t, kSpan> upstream, y;
  };

  __device__ Row begin(int64_t row) const { return row; }

  template <typename Span>
  __device__ Read read(Row row, Span span) const {
    return {load<compute_t, Written>(span, grad + row * D), load<compute_t>(span, output + row * D)};
  }

  template <typename Span>
  __device__ auto make(Row row, Span span, const Read& of) const {
    Packet<compute_t, kSpan> values;
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      values.value[i] = activation.gradient(of.upstream.value[i], of.y.value[i]);
    }
    if (written != nullptr) {
      store(span, values, written + row * stride);
    }
    return values;
  }

  template <int threads>
  __device__ void end(Team<threads>, Row) const {}

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t row) const {
    for_spans<kSpan>(team, D, 0, [&](auto span) { make(row, span, read(row, span)); });
  }
};

}  // namespace

void compute(const MlpOutput& call, Stream stream) {
  dispatch_activation_and_floating(call.activation, call.dtype, [&](auto activation, auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = Compute<scalar_t>;
    launch_rows(stream, call.rows, call.D,
                MlpRows<compute_t, scalar_t, decltype(activation)>{
                    static_cast<const compute_t*>(call.products), static_cast<const compute_t*>(call.bias),
                    static_cast<scalar_t*>(call.output), call.products_stride, call.output_stride, call.D, activation});
  });
}

void compute(const MlpGradient& call, Stream stream) {
  dispatch_activation_and_floating(call.activation, call.dtype, [&](auto activation, auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = Compute<scalar_t>;
    const auto launch_for = [&](auto written_type) {
      using written_t = typename decltype(written_type)::type;
      using Rows = MlpBackwardRows<compute_t, scalar_t, written_t, decltype(activation)>;
      const Rows rows = {static_cast<const scalar_t*>(call.grad),
                         static_cast<const scalar_t*>(call.output),
                         static_cast<written_t*>(call.written),
                         call.written_stride,
                         call.D,
                         activation};
      if (call.sums != nullptr) {
        launch_summed_rows(stream, rows, static_cast<compute_t*>(call.sums), call.rows, call.D);
      } else {  // the batch is small: one block per row
        launch_teams(stream, Team<kBlockThreads>{}, call.rows, rows);
      }
    };
    call.written_dtype == call.dtype ? launch_for(type) : launch_for(Type<compute_t>{});
  });
}

}  // namespace wakesleep::cuda
