#include "../small_batch.h"

#include "small_batch.cuh"

namespace wakesleep::cuda {
namespace {

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

template <typename compute_t>
struct WriteProduct {
  compute_t* __restrict__ products;
  int64_t D;

  __device__ void operator()(int64_t row, int64_t column, compute_t product) const {
    products[row * D + column] = product;
  }
};

}  // namespace

void compute(const SmallBatchProducts& call, Stream stream) {
  dispatch_floating(call.layer.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = Compute<scalar_t>;
    launch_layer<scalar_t>(stream, call.layer,
                           WriteProduct<compute_t>{static_cast<compute_t*>(call.products), call.layer.D});
  });
}

void compute(const SmallBatchOutput& call, Stream stream) {
  dispatch_activation_and_floating(call.activation, call.layer.dtype, [&](auto activation, auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = Compute<scalar_t>;
    launch_layer<scalar_t>(
        stream, call.layer,
        WriteOutput<compute_t, scalar_t, decltype(activation)>{
            static_cast<const compute_t*>(call.bias), static_cast<scalar_t*>(call.output), call.layer.D, activation});
  });
}

}  // namespace wakesleep::cuda
