#include "../linear_bernoulli_sample.h"

#include "bernoulli_rows.cuh"
#include "small_batch.cuh"

namespace wakesleep::cuda {
namespace {

template <typename compute_t, typename x_t, int word>
struct LinearBernoulliSampleRows {
  static constexpr int kBlocks = word == 1 ? 2 : kBlocksOfSampler<compute_t>;  // single elements would spill
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
    draw_row<compute_t, word>(team, read_key(key), element, D, OfLogit{}, logits, x + element);
  }
};

template <typename compute_t, typename x_t>
struct WriteSample {
  const compute_t* __restrict__ bias;
  const int64_t* __restrict__ key;
  x_t* __restrict__ x;
  int64_t D;

  __device__ void operator()(int64_t row, int64_t column, compute_t product) const {
    const int64_t element = row * D + column;
    const compute_t u = draw_element<Uniforms, compute_t>(read_key(key), element);
    x[element] = static_cast<x_t>(draws_one(OfLogit{}, u, product + bias[column]) ? 1 : 0);
  }
};

}  // namespace

void compute(const LinearBernoulliSample& call, Stream stream) {
  dispatch_floating_and_written(call.dtype, call.x_dtype, [&](auto type, auto x_type) {
    using compute_t = Compute<typename decltype(type)::type>;
    using x_t = typename decltype(x_type)::type;
    constexpr int n = kDrawPacket<compute_t>;
    const auto* products = static_cast<const compute_t*>(call.products);
    const auto* bias = static_cast<const compute_t*>(call.bias);
    auto* x = static_cast<x_t*>(call.x);
    const auto all = places(products) | places(bias) | places(x) | call.products_stride | call.D;
    dispatch_word<n>(all, [&](auto word) {
      launch_rows_of<compute_t, n>(stream, call.count, call.D,
                                   LinearBernoulliSampleRows<compute_t, x_t, word>{
                                       products, bias, call.key, x, call.first, call.products_stride, call.D});
    });
  });
}

void compute(const SmallBatchSample& call, Stream stream) {
  dispatch_floating_and_written(call.layer.dtype, call.x_dtype, [&](auto type, auto x_type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = Compute<scalar_t>;
    using x_t = typename decltype(x_type)::type;
    launch_layer<scalar_t>(stream, call.layer,
                           WriteSample<compute_t, x_t>{static_cast<const compute_t*>(call.bias), call.key,
                                                       static_cast<x_t*>(call.x), call.layer.D});
  });
}

}  // namespace wakesleep::cuda
