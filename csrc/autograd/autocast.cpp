// Under autocast, layers and heads compute their matrix products in the autocast dtype, as nn.Linear does.
// Log-likelihoods are still float32. The other ops do not cast their arguments.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "operators.h"

namespace wakesleep {
namespace {

// Calls body(cast) with autocast disabled. cast(tensor) converts a tensor to the autocast dtype of h's device.
template <typename Body>
at::Tensor with_cast(const at::Tensor& h, const Body& body) {
  const auto device = h.device().type();
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  return body([&](const at::Tensor& tensor) {
    return at::autocast::cached_cast(at::autocast::get_lower_precision_fp_from_device_type(device), tensor, device);
  });
}

at::Tensor mlp(const at::Tensor& h, at::TensorList weights, at::TensorList biases,
               std::optional<std::string_view> activation, std::optional<std::string_view> output_activation) {
  return with_cast(h, [&](const auto& cast) {
    const auto cast_all = [&](at::TensorList tensors) {
      std::vector<at::Tensor> all;
      std::transform(tensors.begin(), tensors.end(), std::back_inserter(all), cast);
      return all;
    };
    return autograd::mlp().call(cast(h), cast_all(weights), cast_all(biases), activation, output_activation);
  });
}

// Casts h, weight and bias, then calls op(h, weight, bias, others...), where op is a head.
template <typename Operator, typename... Others>
at::Tensor cast_head(const Operator& op, const at::Tensor& h, const at::Tensor& weight, const at::Tensor& bias,
                     const Others&... others) {
  return with_cast(h, [&](const auto& cast) { return op.call(cast(h), cast(weight), cast(bias), others...); });
}

at::Tensor log_prob(const at::Tensor& h, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& x,
                    std::optional<bool> recompute) {
  return cast_head(autograd::linear_bernoulli_log_prob(), h, weight, bias, x, recompute);
}

at::Tensor log_prob_sum(const at::Tensor& h, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& x,
                        const std::optional<at::Tensor>& sample_weight, double scale) {
  return cast_head(autograd::linear_bernoulli_log_prob_sum(), h, weight, bias, x, sample_weight, scale);
}

at::Tensor sample(const at::Tensor& h, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& key,
                  std::optional<at::ScalarType> dtype) {
  return cast_head(autograd::linear_bernoulli_sample(), h, weight, bias, key, dtype);
}

at::Tensor rsample(const at::Tensor& h, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& key,
                   c10::SymIntArrayRef sample_shape) {
  return cast_head(autograd::linear_gaussian_rsample(), h, weight, bias, key, sample_shape);
}

void implement(torch::Library& m) {
  m.impl("mlp", mlp);
  m.impl("linear_bernoulli_log_prob", log_prob);
  m.impl("linear_bernoulli_log_prob_sum", log_prob_sum);
  m.impl("linear_bernoulli_sample", sample);
  m.impl("linear_gaussian_rsample", rsample);
}

}  // namespace

TORCH_LIBRARY_IMPL(wakesleep_ext, AutocastCPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(wakesleep_ext, AutocastCUDA, m) { implement(m); }

}  // namespace wakesleep
