// Autograd functions that also work under torch.func.
#pragma once

#include <ATen/FuncTorchTLS.h>
#include <torch/csrc/autograd/custom_function.h>

#include "operators.h"

namespace wakesleep::autograd {

inline bool has_tangent(const Tensor& tensor) { return torch::autograd::isFwGradDefined(tensor); }
inline bool has_tangent(const OptionalTensor& tensor) { return tensor && has_tangent(*tensor); }
inline bool has_tangent(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& tensor) { return has_tangent(tensor); });
}
template <typename T>
bool has_tangent(const T&) {
  return false;
}

// Hides the transforms of torch.func from torch::autograd::Function::apply until restore() is called.
class HiddenTransforms {
 public:
  HiddenTransforms() { hidden_.swap(at::functorch::functorchTLSAccessor()); }
  HiddenTransforms(const HiddenTransforms&) = delete;
  HiddenTransforms& operator=(const HiddenTransforms&) = delete;
  ~HiddenTransforms() { restore(); }

  void restore() {
    if (hidden_ != nullptr) {
      at::functorch::functorchTLSAccessor() = std::move(hidden_);
    }
  }

 private:
  std::unique_ptr<at::functorch::FuncTorchTLSBase> hidden_;
};

// What torch applies in place of Derived, with `hidden` as an argument more.
template <typename Derived>
struct Applied : torch::autograd::Function<Applied<Derived>> {
  template <typename... Arguments>
  static auto forward(AutogradContext* context, HiddenTransforms& hidden, Arguments&&... arguments) {
    hidden.restore();
    const at::AutoGradMode enabled(true);  // torch disabled it, but outer transforms need it
    return Derived::forward(context, std::forward<Arguments>(arguments)...);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    variable_list found = Derived::backward(context, grads);
    found.insert(found.begin(), Tensor());  // for `hidden`
    return found;
  }
};

// An autograd function. `Derived` has a `name` for error messages, and `forward` and `backward` as
// torch::autograd::Function has them.
//
// torch::autograd::Function::apply refuses to run under torch.func, because code that calls it directly is seen by the
// innermost transform only. Our functions are called by kernels of the Autograd key. Every transform dispatches to
// these kernels in turn, as it does to torch's own, so the refusal does not apply.
template <typename Derived>
struct Function {
  template <typename... Arguments>
  static auto apply(Arguments&&... arguments) {
    if ((has_tangent(arguments) || ...)) {
      C10_THROW_ERROR(NotImplementedError, std::string(Derived::name) +
                                               ": forward-mode differentiation is not supported, so torch.func.jacfwd "
                                               "and hessian fail. Use torch.func.jacrev instead, and "
                                               "torch.func.jacrev(jacrev(f)) for a Hessian");
    }
    HiddenTransforms hidden;
    return Applied<Derived>::apply(hidden, std::forward<Arguments>(arguments)...);
  }
};

}  // namespace wakesleep::autograd
