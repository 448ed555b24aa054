// Declares every operator of the library. This file is the table of contents of csrc/.
//
// Distribution parameters come before the value. The last dimension is the event. Its size is K for latent variables
// and D for observed variables. B stands for any number of batch dimensions, and S for any number of sample dimensions.
// An operator X is implemented in ops/X.cpp, kernels/cpu/X.cpp and kernels/cuda/X.cu, and its gradient in
// autograd/X.cpp. X_backward is in the same files as X. If X has the parameters mu and logvar, X_backward returns their
// gradients packed in one tensor. wakesleep_ext/ops.py documents the public functions.
#include <torch/library.h>

#include <string>
#include <vector>

namespace {

enum class Kind { kernel, reads_generator, composite };

struct Operator {
  const char* schema;
  Kind kind = Kind::kernel;  // a composite calls other operators and has no kernels
};

constexpr Operator kOperators[] = {
    // keys: int64 [*members, 2], [seed, offset] each, on the device of `like`
    {"draw_key(Tensor like, *, Generator? generator=None, SymInt[] members=[]) -> Tensor", Kind::reads_generator},

    // splits [mu | logvar] into two views; the gradient is one packed tensor
    {"gaussian_parameters(Tensor(a) packed) -> (Tensor(a), Tensor(a))", Kind::composite},

    // draws, which are deterministic functions of the parameters and the key; if there is a key for each of the first
    // dimensions M of the parameters, [*M, 2], the draws are [*M, *S, *B, K]
    {"gaussian_rsample(Tensor mu, Tensor logvar, Tensor key, SymInt[] sample_shape) -> Tensor"},
    {"gaussian_rsample_log_prob(Tensor mu, Tensor logvar, Tensor key, SymInt[] sample_shape) -> (Tensor, Tensor)"},
    {"gaussian_rsample_backward(Tensor? grad_z, Tensor? grad_log_prob, Tensor mu, Tensor logvar, Tensor key, "
     "SymInt[] sample_shape) -> Tensor"},
    {"bernoulli_sample(Tensor logits, Tensor key, SymInt[] sample_shape, ScalarType? dtype=None) -> Tensor"},

    // draws binary images from uint8 grey images [N, D], or from the rows that index [B] selects
    {"binarize(Tensor grey, Tensor key, int white=255, Tensor? index=None, ScalarType? dtype=None) -> Tensor"},

    // log-densities and KL divergences, summed over the event
    {"gaussian_log_prob(Tensor mu, Tensor logvar, Tensor z) -> Tensor"},
    {"gaussian_log_prob_backward(Tensor grad, Tensor mu, Tensor logvar, Tensor z, bool with_grad_z) "
     "-> (Tensor, Tensor)"},
    // scale sum_n sample_weight_n log N(z_n), and the op that computes it, log N(z_n) and the gradients
    {"gaussian_log_prob_sum(Tensor mu, Tensor logvar, Tensor z, Tensor? sample_weight=None, float scale=1.0) -> Tensor",
     Kind::composite},
    {"gaussian_log_prob_and_gradients(Tensor mu, Tensor logvar, Tensor z, Tensor? sample_weight, float scale, "
     "bool with_grad_z, bool with_log_prob) -> (Tensor, Tensor, Tensor, Tensor)"},
    {"standard_gaussian_log_prob(Tensor z) -> Tensor"},
    {"standard_gaussian_log_prob_backward(Tensor grad, Tensor z) -> Tensor"},
    {"gaussian_kl(Tensor mu, Tensor logvar) -> Tensor"},
    {"gaussian_kl_backward(Tensor grad, Tensor mu, Tensor logvar) -> Tensor"},
    {"gaussian_kl_between(Tensor mu, Tensor logvar, Tensor prior_mu, Tensor prior_logvar) -> Tensor"},
    {"gaussian_kl_between_backward(Tensor grad, Tensor mu, Tensor logvar, Tensor prior_mu, Tensor prior_logvar, "
     "bool with_grad, bool with_grad_prior) -> (Tensor, Tensor)"},
    {"bernoulli_log_prob(Tensor logits, Tensor x) -> Tensor"},
    {"bernoulli_log_prob_backward(Tensor grad, Tensor logits, Tensor x) -> Tensor"},

    // layers f(h weight^T + bias), applied in sequence: h [*B, H], weight [D, H], bias [D]
    {"mlp(Tensor h, Tensor[] weights, Tensor[] biases, str? activation=None, str? output_activation=None) "
     "-> Tensor"},
    // also returns the output [N, D] of every layer except the last
    {"mlp_with_hidden(Tensor h, Tensor[] weights, Tensor[] biases, str? activation, str? output_activation) "
     "-> (Tensor, Tensor[])"},
    {"mlp_backward(Tensor grad, Tensor output, Tensor[] hidden, Tensor h, Tensor[] weights, Tensor[] biases, "
     "str? activation, str? output_activation, bool with_grad_h, bool with_grad_weights) "
     "-> (Tensor, Tensor[], Tensor[])"},

    // a Gaussian head, which draws z [*S, *B, K] from [mu | logvar] = h weight^T + bias: h [*B, H], weight [2K, H]
    {"linear_gaussian_rsample(Tensor h, Tensor weight, Tensor bias, Tensor key, SymInt[] sample_shape) -> Tensor"},

    // a Bernoulli head with logits h weight^T + bias: h [*S, *B, H], weight [D, H], bias [D], x [*B, D]
    {"linear_bernoulli_sample(Tensor h, Tensor weight, Tensor bias, Tensor key, ScalarType? dtype=None) -> Tensor"},
    {"linear_bernoulli_log_prob(Tensor h, Tensor weight, Tensor bias, Tensor x, bool? recompute=None) -> Tensor"},
    // also returns the logits without their bias if they take at most kept_bytes, otherwise an empty tensor
    {"linear_bernoulli_log_prob_and_logits(Tensor h, Tensor weight, Tensor bias, Tensor x, int kept_bytes) "
     "-> (Tensor, Tensor)"},
    {"linear_bernoulli_log_prob_backward(Tensor grad, Tensor h, Tensor weight, Tensor bias, Tensor x, Tensor? logits, "
     "bool with_grad_h, bool with_grad_weight) -> (Tensor, Tensor, Tensor)"},
    // scale sum_n sample_weight_n log p(x_n | h_n), and the op that computes it, log p(x_n | h_n) and the gradients
    {"linear_bernoulli_log_prob_sum(Tensor h, Tensor weight, Tensor bias, Tensor x, Tensor? sample_weight=None, "
     "float scale=1.0) -> Tensor",
     Kind::composite},
    {"linear_bernoulli_log_prob_and_gradients(Tensor h, Tensor weight, Tensor bias, Tensor x, Tensor? sample_weight, "
     "float scale, bool with_grad_h, bool with_grad_weight, bool with_log_prob) "
     "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"},

    // adds a number to each of several counters: int64, float64 or float32, [size] or [] each
    {"advance_(Tensor(a!)[] counters, int[] amounts) -> ()"},

    // one optimizer step for a list of tensors of any shapes
    {"adam_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor step, "
     "Tensor lr, float beta1, float beta2, float eps) -> ()"},
};

}  // namespace

TORCH_LIBRARY(wakesleep_ext, m) {
  const std::vector<at::Tag> pure = {at::Tag::pt2_compliant_tag};
  const std::vector<at::Tag> reads_generator = {at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded};
  for (const Operator& op : kOperators) {
    m.def(op.schema, op.kind == Kind::reads_generator ? reads_generator : pure);
  }
}

#ifndef WAKESLEEP_CUDA_VERSION
namespace {

void built_without_cuda(const c10::OperatorHandle& op, torch::jit::Stack*) {
  C10_THROW_ERROR(NotImplementedError,
                  op.operator_name().name +
                      ": got a CUDA tensor, but wakesleep_ext was built without CUDA. Install the CUDA toolkit "
                      "that matches this torch, with nvcc on the PATH or CUDA_HOME set. Then reinstall with "
                      "WAKESLEEP_FORCE_CUDA=1 in front of the command that `wakesleep info` prints");
}

}  // namespace

TORCH_LIBRARY_IMPL(wakesleep_ext, CUDA, m) {
  for (const Operator& op : kOperators) {
    if (op.kind == Kind::composite) {
      continue;
    }
    const std::string schema = op.schema;
    m.impl(schema.substr(0, schema.find('(')).c_str(),
           torch::CppFunction::makeFromBoxedFunction<&built_without_cuda>());
  }
}
#endif
