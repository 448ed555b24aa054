// Counters have no gradient. The op increments their versions, so autograd raises an error if a graph saved the old
// values.
#include "operators.h"

namespace wakesleep::autograd {
namespace {

WAKESLEEP_OPERATOR(advance_, void(at::TensorList, at::IntArrayRef))

void advance(at::TensorList counters, at::IntArrayRef amounts) {
  for (size_t i = 0; i < counters.size() && at::GradMode::is_enabled(); ++i) {
    TORCH_CHECK(!counters[i].requires_grad(), "advance_: expected counters[", i, "] not to require a gradient");
  }
  below(advance_(), counters, amounts);
  for (const Tensor& counter : counters) {
    counter.unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(wakesleep_ext, ADInplaceOrView, m) { m.impl("advance_", advance); }

}  // namespace wakesleep::autograd
