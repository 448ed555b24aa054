// Instantiates Registrar::impl for the signature of every kernel.
#include "registration.h"

#include <torch/library.h>

#include <string_view>
#include <tuple>
#include <vector>

namespace wakesleep {

template <typename Signature>
void Registrar::impl(const char* name, Signature* kernel) {
  library_.impl(name, kernel);
}

namespace {

using In = const at::Tensor&;
using OptionalIn = const std::optional<at::Tensor>&;
using Name = std::optional<std::string_view>;
using Dtype = std::optional<at::ScalarType>;
using Out = at::Tensor;
using Outs = std::vector<at::Tensor>;

}  // namespace

#define WAKESLEEP_SIGNATURE(...) \
  template void Registrar::impl<__VA_ARGS__>(const char*, std::add_pointer_t<__VA_ARGS__>)

// Lists each signature once. The comment on the right names an operator with this signature.
WAKESLEEP_SIGNATURE(Out(In));                                                   // standard_gaussian_log_prob
WAKESLEEP_SIGNATURE(Out(In, In));                                               // gaussian_kl
WAKESLEEP_SIGNATURE(Out(In, In, In));                                           // gaussian_log_prob
WAKESLEEP_SIGNATURE(Out(In, std::optional<at::Generator>));                     // draw_key
WAKESLEEP_SIGNATURE(Out(In, In, In, at::IntArrayRef));                          // gaussian_rsample
WAKESLEEP_SIGNATURE(std::tuple<Out, Out>(In, In, In, at::IntArrayRef));         // ..._log_prob
WAKESLEEP_SIGNATURE(Out(OptionalIn, OptionalIn, In, In, In, at::IntArrayRef));  // ..._backward
WAKESLEEP_SIGNATURE(std::tuple<Out, Out>(In, In, In, In, bool));                // gaussian_log_prob_backward
WAKESLEEP_SIGNATURE(Out(In, In, at::IntArrayRef, Dtype));                       // bernoulli_sample
WAKESLEEP_SIGNATURE(Out(In, In, int64_t, OptionalIn, Dtype));                   // binarize
WAKESLEEP_SIGNATURE(Out(In, at::TensorList, at::TensorList, Name, Name));       // mlp
WAKESLEEP_SIGNATURE(std::tuple<Out, Outs>(In, at::TensorList, at::TensorList, Name, Name));  // ..._with_hidden
WAKESLEEP_SIGNATURE(std::tuple<Out, Outs, Outs>(In, In, at::TensorList, In, at::TensorList,  // ..._backward
                                                at::TensorList, Name, Name, bool, bool));
WAKESLEEP_SIGNATURE(Out(In, In, In, In, Dtype));                     // linear_bernoulli_sample
WAKESLEEP_SIGNATURE(Out(In, In, In, In, std::optional<bool>));       // linear_bernoulli_log_prob
WAKESLEEP_SIGNATURE(std::tuple<Out, Out>(In, In, In, In, int64_t));  // ..._and_logits
WAKESLEEP_SIGNATURE(std::tuple<Out, Out, Out>(In, In, In, In, In, OptionalIn, bool, bool));   // ..._backward
WAKESLEEP_SIGNATURE(std::tuple<Out, Out, Out, Out>(In, In, In, In, OptionalIn, bool, bool));  // ..._and_gradients
WAKESLEEP_SIGNATURE(void(at::TensorList, at::TensorList, at::TensorList, at::TensorList, In, In, double, double,
                         double));  // adam_

}  // namespace wakesleep
