// Ops whose results carry no gradient, whatever their arguments require.
#include <torch/library.h>

TORCH_LIBRARY_IMPL(wakesleep_ext, Autograd, m) {
  m.impl("draw_key", torch::CppFunction::makeFallthrough());
  m.impl("bernoulli_sample", torch::CppFunction::makeFallthrough());
}
