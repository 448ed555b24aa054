// x ~ Bernoulli(s(h weight^T + bias)), on CUDA, a chunk of rows at a time.
#include <torch/library.h>

#include "../linear_bernoulli.h"
#include "bernoulli_rows.cuh"

namespace wakesleep::cuda {
namespace {

template <typename compute_t, typename x_t>
struct LinearBernoulliSampleRows {
  const compute_t* __restrict__ products;
  const compute_t* __restrict__ bias;
  const int64_t* __restrict__ key;
  x_t* __restrict__ x;
  int64_t first;   // row of the chunk
  int64_t stride;  // of products
  int64_t D;

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t row) const {
    const ProductAndBias<compute_t> logits = {products + row * stride, bias};
    const int64_t element = (first + row) * D;
    draw_row<kDrawPacket<compute_t>>(team, read_key(key), element, D, OfLogit{}, logits, x + element);
  }
};

at::Tensor linear_bernoulli_sample(const at::Tensor& h,       // [*B, H]
                                   const at::Tensor& weight,  // [D, H]
                                   const at::Tensor& bias,    // [D]
                                   const at::Tensor& key,     // [2]
                                   std::optional<at::ScalarType> dtype) {
  const LinearBernoulliSample call(h, weight, bias, key, dtype);
  call.for_products(call.h, false, [&](int64_t first, const at::Tensor&, const at::Tensor& products) {
    dispatch_floating_and_written(call.op, call.dtype, call.x.scalar_type(), [&](auto type, auto x_type) {
      using compute_t = at::opmath_type<typename decltype(type)::type>;
      using x_t = typename decltype(x_type)::type;
      launch_rows(
          products.size(0), call.D,
          LinearBernoulliSampleRows<compute_t, x_t>{
              products.const_data_ptr<compute_t>(), call.bias.const_data_ptr<compute_t>(),
              call.key.const_data_ptr<int64_t>(), call.x.mutable_data_ptr<x_t>(), first, products.stride(0), call.D});
    });
  });
  return as_dtype(call.x, call.asked);
}

}  // namespace

TORCH_LIBRARY_IMPL(wakesleep_ext, CUDA, m) { m.impl("linear_bernoulli_sample", linear_bernoulli_sample); }

}  // namespace wakesleep::cuda
