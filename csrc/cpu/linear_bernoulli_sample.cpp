// x ~ Bernoulli(s(h weight^T + bias)), on the CPU, a chunk of rows at a time.
#include "../linear_bernoulli.h"
#include "../registration.h"
#include "bernoulli_rows.h"
#include "products.h"

namespace wakesleep::cpu {
namespace {

at::Tensor linear_bernoulli_sample(const at::Tensor& h,       // [*B, H]
                                   const at::Tensor& weight,  // [D, H]
                                   const at::Tensor& bias,    // [D]
                                   const at::Tensor& key,     // [2]
                                   std::optional<at::ScalarType> dtype) {
  const LinearBernoulliSample call(h, weight, bias, key, dtype);
  call.for_products<Products>(call.h, false, [&](int64_t first, const at::Tensor&, const at::Tensor& products) {
    dispatch_floating_and_written(call.op, call.dtype, call.x.scalar_type(), [&](auto type, auto x_type) {
      using compute_t = at::opmath_type<typename decltype(type)::type>;
      using x_t = typename decltype(x_type)::type;
      const auto* products_data = products.const_data_ptr<compute_t>();
      const auto* bias_data = call.bias.const_data_ptr<compute_t>();
      const auto logits_of = [&](int64_t row) {
        return ProductAndBias<compute_t>{products_data + row * products.stride(0), bias_data};
      };
      draw_rows<compute_t>(read_key(call.key), first, products.size(0), call.D, OfLogit{}, logits_of,
                           call.x.mutable_data_ptr<x_t>());
    });
  });
  return as_dtype(call.x, call.asked);
}

}  // namespace

WAKESLEEP_KERNELS(CPU, m) { m.impl("linear_bernoulli_sample", linear_bernoulli_sample); }

}  // namespace wakesleep::cpu
