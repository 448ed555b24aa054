// An Adam step is not differentiable. It increments the version of every tensor that it modifies, so autograd raises an
// error if a graph saved the old values.
#include "operators.h"

namespace wakesleep::autograd {
namespace {

WAKESLEEP_OPERATOR(adam_, void(at::TensorList, at::TensorList, at::TensorList, at::TensorList, const Tensor&,
                               const Tensor&, double, double, double))

void adam(at::TensorList parameters, at::TensorList gradients, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
          const Tensor& step, const Tensor& lr, double beta1, double beta2, double eps) {
  for (size_t i = 0; i < parameters.size() && at::GradMode::is_enabled(); ++i) {
    TORCH_CHECK(!parameters[i].requires_grad(), "adam_: expected to be called under torch.no_grad(), since parameters[",
                i, "] requires a gradient");
  }
  below(adam_(), parameters, gradients, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, eps);
  for (const at::TensorList changed : {parameters, exp_avgs, exp_avg_sqs}) {
    for (const Tensor& tensor : changed) {
      tensor.unsafeGetTensorImpl()->bump_version();
    }
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(wakesleep_ext, ADInplaceOrView, m) { m.impl("adam_", adam); }

}  // namespace wakesleep::autograd
