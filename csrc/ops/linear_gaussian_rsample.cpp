// z = mu + sigma eps with [mu | logvar] = h weight^T + bias. The kernel for small batches draws z as it computes the
// layer. With many rows or samples, the layer and the draw take one pass each, and give the same bits.
#include "gaussian.h"
#include "linear_bernoulli.h"
#include "register.h"

namespace wakesleep {
namespace {

// The kernel draws the samples of an element in two threads. They take 125 instructions for each sample, so more
// samples would take longer than another launch. This is an estimate; it was not measured.
constexpr int64_t kMostSamples = 50;

at::Tensor linear_gaussian_rsample(const at::Tensor& h_in,       // [*B, H]
                                   const at::Tensor& weight_in,  // [2K, H]
                                   const at::Tensor& bias_in,    // [2K]
                                   const at::Tensor& key_in,     // [2]
                                   at::IntArrayRef sample_shape) {
  const BelowAutograd below_autograd;
  const Head call("linear_gaussian_rsample", h_in, weight_in, bias_in);
  TORCH_CHECK_VALUE(call.D % 2 == 0, call.op, ": expected weight to have an even number of rows, [mu | logvar], got ",
                    call.D);
  check_key(call.op, key_in, {"h", h_in});
  check_sizes(call.op, "sample_shape", sample_shape);
  const int64_t K = call.D / 2, samples = c10::multiply_integers(sample_shape);
  const auto batch = batch_sizes(h_in);
  const at::Tensor h = as_rows(h_in, c10::multiply_integers(batch));
  if (call.method(h) != Method::small_batch || samples > kMostSamples) {
    const at::Tensor packed = mlp(h_in, weight_in, bias_in, std::nullopt, std::nullopt);
    return std::get<0>(
        draw_gaussian(call.op, packed.narrow(-1, 0, K), packed.narrow(-1, K, K), key_in, sample_shape, false));
  }
  const SmallBatch small(h, call, call.dtype);
  const at::Tensor key = key_in.contiguous();
  const at::Tensor z = at::empty(concat(sample_shape, concat(batch, {K})), small.h.options());
  if (z.numel() > 0) {
    small.compute(
        SmallBatchGaussianSample{small.layer(), read(call.bias), key.const_data_ptr<int64_t>(), write(z), samples});
  }
  return z;
}

}  // namespace

WAKESLEEP_OPS(m) { m.impl("linear_gaussian_rsample", linear_gaussian_rsample); }

}  // namespace wakesleep
