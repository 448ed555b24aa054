// Registers the ops whose results never require a gradient. Ops with `_and_` or `_with_` in their names are called by
// differentiable ops.
#include <torch/library.h>

TORCH_LIBRARY_IMPL(wakesleep_ext, Autograd, m) {
  m.impl("draw_key", torch::CppFunction::makeFallthrough());
  m.impl("binarize", torch::CppFunction::makeFallthrough());
  m.impl("bernoulli_sample", torch::CppFunction::makeFallthrough());
  m.impl("linear_bernoulli_sample", torch::CppFunction::makeFallthrough());
  m.impl("adam_", torch::CppFunction::makeFallthrough());
  m.impl("advance_", torch::CppFunction::makeFallthrough());
  m.impl("linear_bernoulli_log_prob_and_logits", torch::CppFunction::makeFallthrough());
  m.impl("mlp_with_hidden", torch::CppFunction::makeFallthrough());
  m.impl("linear_bernoulli_log_prob_and_gradients", torch::CppFunction::makeFallthrough());
  m.impl("gaussian_log_prob_and_gradients", torch::CppFunction::makeFallthrough());
}
