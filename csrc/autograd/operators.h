// Code that the autograd kernels share: typed operator handles, and a function that checks whether a call needs
// gradients.
#pragma once

#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "../backend.h"

namespace wakesleep::autograd {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Defines name(), which looks up the operator's handle on the first call and returns the cached handle on later calls.
#define WAKESLEEP_OPERATOR(name, ...)                                                                     \
  inline const c10::TypedOperatorHandle<__VA_ARGS__>& name() {                                            \
    static const auto handle =                                                                            \
        c10::Dispatcher::singleton().findSchemaOrThrow("wakesleep_ext::" #name, "").typed<__VA_ARGS__>(); \
    return handle;                                                                                        \
  }

using OptionalName = std::optional<std::string_view>;
using OptionalTensor = std::optional<Tensor>;
using Pair = std::tuple<Tensor, Tensor>;
using Triple = std::tuple<Tensor, Tensor, Tensor>;
using Quadruple = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Quintuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The operators that several files call.
WAKESLEEP_OPERATOR(mlp, Tensor(const Tensor&, at::TensorList, at::TensorList, OptionalName, OptionalName))
WAKESLEEP_OPERATOR(linear_bernoulli_log_prob,
                   Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, std::optional<bool>))
WAKESLEEP_OPERATOR(linear_bernoulli_log_prob_sum,
                   Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, double))
WAKESLEEP_OPERATOR(linear_bernoulli_sample,
                   Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, std::optional<at::ScalarType>))
WAKESLEEP_OPERATOR(gaussian_parameters, Pair(const Tensor&))
WAKESLEEP_OPERATOR(gaussian_rsample, Tensor(const Tensor&, const Tensor&, const Tensor&, c10::SymIntArrayRef))
WAKESLEEP_OPERATOR(linear_gaussian_rsample,
                   Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, c10::SymIntArrayRef))
WAKESLEEP_OPERATOR(mlp_with_hidden, std::tuple<Tensor, std::vector<Tensor>>(const Tensor&, at::TensorList,
                                                                            at::TensorList, OptionalName, OptionalName))
WAKESLEEP_OPERATOR(mlp_backward, std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>>(
                                     const Tensor&, const Tensor&, at::TensorList, const Tensor&, at::TensorList,
                                     at::TensorList, OptionalName, OptionalName, bool, bool))
WAKESLEEP_OPERATOR(bernoulli_log_prob, Tensor(const Tensor&, const Tensor&))
WAKESLEEP_OPERATOR(bernoulli_log_prob_backward, Tensor(const Tensor&, const Tensor&, const Tensor&))
WAKESLEEP_OPERATOR(linear_bernoulli_log_prob_and_logits,
                   Pair(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t))
WAKESLEEP_OPERATOR(linear_bernoulli_log_prob_backward,
                   Triple(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                          const OptionalTensor&, bool, bool))

// Registers an operator that only calls others. vmap needs a registration of its own, or it would call each member.
#define WAKESLEEP_COMPOSITE(op, function)                                                    \
  TORCH_LIBRARY_IMPL(wakesleep_ext, CompositeImplicitAutograd, m) { m.impl(#op, function); } \
  TORCH_LIBRARY_IMPL(wakesleep_ext, FuncTorchBatchedDecomposition, m) { m.impl(#op, function); }

template <typename... Tensors>
bool needs_gradient(const Tensors&... tensors) {
  return (torch::autograd::isFwGradDefined(tensors) || ...) || torch::autograd::compute_requires_grad(tensors...);
}

inline bool needs_gradients(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& tensor) { return needs_gradient(tensor); });
}

// Returns true if any tensor belongs to a transform of torch.func.
template <typename... Tensors>
bool is_transformed(const Tensors&... tensors) {
  constexpr c10::DispatchKeySet keys({c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::FuncTorchBatched});
  return (tensors.key_set().has_any(keys) || ...);
}

// Returns the dtype of a layer's result.
inline at::ScalarType promoted(const Tensor& h, const Tensor& weight, const Tensor& bias) {
  return c10::promoteTypes(c10::promoteTypes(h.scalar_type(), weight.scalar_type()), bias.scalar_type());
}

// Returns the dtype of the result of several layers.
inline at::ScalarType promoted(const Tensor& h, at::TensorList weights, at::TensorList biases) {
  at::ScalarType type = h.scalar_type();
  for (size_t l = 0; l < weights.size(); ++l) {
    type = c10::promoteTypes(type, promoted(h, weights[l], biases[l]));
  }
  return type;
}

// Calls an operator below autograd.
template <typename Operator, typename... Arguments>
auto below(const Operator& op, const Arguments&... arguments) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(arguments...);
}

// Reduces a gradient from the broadcast shape to the shape of its operand.
inline Tensor sum_like(const Tensor& gradient, const Tensor& owner) { return at::sum_to(gradient, owner.sym_sizes()); }

// Returns views of the halves of a packed [mu | logvar].
inline Pair halves(const Tensor& packed) {
  const c10::SymInt K = packed.sym_size(-1) / 2;
  return {packed.slice_symint(-1, 0, K), packed.slice_symint(-1, K, 2 * K)};  // as narrow() does, after more checks
}

}  // namespace wakesleep::autograd
