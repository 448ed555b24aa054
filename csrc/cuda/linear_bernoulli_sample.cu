// x ~ Bernoulli(s(h weight^T + bias)), on CUDA, a chunk of rows at a time.
#include "../linear_bernoulli.h"
#include "../registration.h"
#include "bernoulli_rows.cuh"
#include "small_batch.cuh"

namespace wakesleep::cuda {
namespace {

template <typename compute_t, typename x_t>
struct LinearBernoulliSampleRows {
  const compute_t* __restrict__ products;
  const compute_t* __restrict__ bias;
  const int64_t* __restrict__ key;
  x_t* __restrict__ x;
  int64_t first;   // first row of the chunk
  int64_t stride;  // row stride of products
  int64_t D;

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t row) const {
    const ProductAndBias<compute_t> logits = {products + row * stride, bias};
    const int64_t element = (first + row) * D;
    draw_row<kDrawPacket<compute_t>>(team, read_key(key), element, D, OfLogit{}, logits, x + element);
  }
};

// Draws each element separately, from one of the four words of a Philox block.
template <typename compute_t, typename x_t>
struct WriteSample {
  const compute_t* __restrict__ bias;
  const int64_t* __restrict__ key;
  x_t* __restrict__ x;
  int64_t D;

  __device__ void operator()(int64_t row, int64_t column, compute_t product) const {
    const int64_t element = row * D + column;
    const auto u = draw<Uniforms, compute_t, kPhiloxWords>(read_key(key), element / kPhiloxWords * kPhiloxWords);
    compute_t its = u.value[0];
#pragma unroll
    for (int w = 1; w < kPhiloxWords; ++w) {
      its = element % kPhiloxWords == w ? u.value[w] : its;
    }
    x[element] = static_cast<x_t>(draws_one(OfLogit{}, its, product + bias[column]) ? 1 : 0);
  }
};

at::Tensor linear_bernoulli_sample(const at::Tensor& h,       // [*B, H]
                                   const at::Tensor& weight,  // [D, H]
                                   const at::Tensor& bias,    // [D]
                                   const at::Tensor& key,     // [2]
                                   std::optional<at::ScalarType> dtype) {
  const LinearBernoulliSample call(h, weight, bias, key, dtype);
  if (call.N <= small_batch_limit()) {
    const FewRows operands(call.h, call.weight, call.dtype);
    dispatch_floating_and_written(call.op, call.dtype, call.x.scalar_type(), [&](auto type, auto x_type) {
      using scalar_t = typename decltype(type)::type;
      using compute_t = at::opmath_type<scalar_t>;
      using x_t = typename decltype(x_type)::type;
      launch_layer<scalar_t>(operands, WriteSample<compute_t, x_t>{call.bias.const_data_ptr<compute_t>(),
                                                                   call.key.const_data_ptr<int64_t>(),
                                                                   call.x.mutable_data_ptr<x_t>(), call.D});
    });
    return as_dtype(call.x, call.asked);
  }
  call.for_products<PlatformProducts>(call.h, false, [&](int64_t first, const at::Tensor&, const at::Tensor& products) {
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

WAKESLEEP_KERNELS(CUDA, m) { m.impl("linear_bernoulli_sample", linear_bernoulli_sample); }

}  // namespace wakesleep::cuda
