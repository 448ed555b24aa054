// Under autocast a layer or a Bernoulli head multiplies in the lower precision, as nn.Linear does.
// Log-likelihoods come back in float32, as ever; the other ops take their arguments as they are.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "autograd/operators.h"

namespace wakesleep {
namespace {

// op(h, weight, bias, others...), a linear layer, with the first three cast.
template <typename Operator, typename... Others>
at::Tensor cast_layer(const Operator& op, const at::Tensor& h, const at::Tensor& weight, const at::Tensor& bias,
                      const Others&... others) {
  const auto device = h.device().type();
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto cast = [&](const at::Tensor& tensor) {
    return at::autocast::cached_cast(at::autocast::get_lower_precision_fp_from_device_type(device), tensor, device);
  };
  return op.call(cast(h), cast(weight), cast(bias), others...);
}

at::Tensor layer(const at::Tensor& h, const at::Tensor& weight, const at::Tensor& bias,
                 std::optional<std::string_view> activation) {
  return cast_layer(autograd::linear(), h, weight, bias, activation);
}

at::Tensor log_prob(const at::Tensor& h, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& x,
                    std::optional<bool> recompute) {
  return cast_layer(autograd::linear_bernoulli_log_prob(), h, weight, bias, x, recompute);
}

at::Tensor log_prob_sum(const at::Tensor& h, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& x,
                        const std::optional<at::Tensor>& importance) {
  return cast_layer(autograd::linear_bernoulli_log_prob_sum(), h, weight, bias, x, importance);
}

at::Tensor sample(const at::Tensor& h, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& key,
                  std::optional<at::ScalarType> dtype) {
  return cast_layer(autograd::linear_bernoulli_sample(), h, weight, bias, key, dtype);
}

void implement(torch::Library& m) {
  m.impl("linear", layer);
  m.impl("linear_bernoulli_log_prob", log_prob);
  m.impl("linear_bernoulli_log_prob_sum", log_prob_sum);
  m.impl("linear_bernoulli_sample", sample);
}

}  // namespace

TORCH_LIBRARY_IMPL(wakesleep_ext, AutocastCPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(wakesleep_ext, AutocastCUDA, m) { implement(m); }

}  // namespace wakesleep
