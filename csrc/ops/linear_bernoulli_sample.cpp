// x ~ Bernoulli(s(h weight^T + bias)).
#include "linear_bernoulli.h"
#include "register.h"

namespace wakesleep {
namespace {

at::Tensor linear_bernoulli_sample(const at::Tensor& h_in,       // [*B, H]
                                   const at::Tensor& weight_in,  // [D, H]
                                   const at::Tensor& bias_in,    // [D]
                                   const at::Tensor& key_in,     // [2]
                                   std::optional<at::ScalarType> dtype) {
  const BelowAutograd below_autograd;
  const Head call("linear_bernoulli_sample", h_in, weight_in, bias_in);
  const auto batch = batch_sizes(h_in);
  const at::Tensor h = as_rows(h_in, c10::multiply_integers(batch));
  check_key(call.op, key_in, {"h", h_in});
  const at::Tensor key = key_in.contiguous();
  const auto* words = key.const_data_ptr<int64_t>();
  const at::ScalarType asked = dtype.value_or(call.dtype);
  const at::Tensor x =
      at::empty(concat(batch, {call.D}), call.weight.options().dtype(written_dtype(call.op, asked, call.dtype)));
  if (call.method(h) == Method::small_batch) {
    const SmallBatch small(h, call, call.dtype);
    small.compute(SmallBatchSample{small.layer(), read(call.bias), words, dtype_of(x), write(x)});
  } else {
    call.for_products(h, false, [&](int64_t first, const at::Tensor&, const at::Tensor& products) {
      compute(call.device, LinearBernoulliSample{dtype_of(call.dtype), dtype_of(x), read(products), read(call.bias),
                                                 words, write(x), first, products.size(0), call.D, products.stride(0)});
    });
  }
  return as_dtype(x, asked);
}

}  // namespace

WAKESLEEP_OPS(m) { m.impl("linear_bernoulli_sample", linear_bernoulli_sample); }

}  // namespace wakesleep
