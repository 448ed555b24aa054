// Batching rules of the operators, for vmap. The batch becomes a leading dimension, so that one call computes all
// members. Each tensor gets this dimension, but a tensor that all members share is not copied.
//
// Where a leading dimension would mean something else, as for the weights of layers, rules call torch's batched
// products. A draw gets one key for each member.
#include <ATen/functorch/BatchedTensorImpl.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include "activation_formulas.h"
#include "operators.h"

namespace wakesleep::autograd {
namespace {

using Tensors = std::vector<Tensor>;

WAKESLEEP_OPERATOR(binarize,
                   Tensor(const Tensor&, const Tensor&, int64_t, const OptionalTensor&, std::optional<at::ScalarType>))
WAKESLEEP_OPERATOR(bernoulli_sample,
                   Tensor(const Tensor&, const Tensor&, c10::SymIntArrayRef, std::optional<at::ScalarType>))

// The innermost vmap to which an argument of a call belongs. While the Level exists, operators are called below it.
class Level {
 public:
  template <typename T>
  void add(const T&) {}

  void add(const Tensor& tensor) {
    const auto* const batch = at::functorch::maybeGetBatchedImpl(tensor);
    if (batch != nullptr && batch->level() > id_) {
      id_ = batch->level();
      size_ = batch->value().sym_size(batch->bdim());
    }
  }

  void add(const OptionalTensor& tensor) {
    if (tensor && tensor->defined()) {
      add(*tensor);
    }
  }

  void add(at::TensorList tensors) {
    for (const Tensor& tensor : tensors) {
      add(tensor);
    }
  }

  const c10::SymInt& size() const { return size_; }

  bool has(const Tensor& tensor) const {
    const auto* const batch = at::functorch::maybeGetBatchedImpl(tensor);
    return batch != nullptr && batch->level() == id_;
  }
  bool has(at::TensorList tensors) const {
    return std::any_of(tensors.begin(), tensors.end(), [&](const Tensor& tensor) { return has(tensor); });
  }

  // Returns a member's shape [*shape] as [N, 1, .., 1, *shape], with at least 1 + `dims` dimensions.
  Tensor leading(const Tensor& tensor, int64_t dims = 0) const {
    Tensor value = tensor;
    if (has(tensor)) {
      const auto* const batch = at::functorch::maybeGetBatchedImpl(tensor);
      value = batch->value().movedim(batch->bdim(), 0);
    } else {
      auto shape = value.sym_sizes().vec();
      shape.insert(shape.begin(), size());
      value = value.expand_symint(shape);
    }
    while (value.dim() <= dims) {
      value = value.unsqueeze(1);
    }
    return value;
  }

  Tensors leading(at::TensorList tensors) const {
    Tensors all;
    std::transform(tensors.begin(), tensors.end(), std::back_inserter(all),
                   [&](const Tensor& tensor) { return leading(tensor); });
    return all;
  }

  // Returns a tensor [N, *shape] as the result of all members.
  Tensor result(const Tensor& tensor) const { return at::functorch::makeBatched(tensor, 0, id_); }

  Tensors results(Tensors tensors) const {
    std::transform(tensors.begin(), tensors.end(), tensors.begin(),
                   [&](const Tensor& tensor) { return result(tensor); });
    return tensors;
  }

 private:
  const c10::impl::ExcludeDispatchKeyGuard guard_{c10::DispatchKey::FuncTorchBatched};
  int64_t id_ = -1;
  c10::SymInt size_;
};

template <typename Rule, typename... Arguments>
auto batched(const Rule& rule, const Arguments&... arguments) {
  Level level;
  (level.add(arguments), ...);
  return rule(level);
}

// ---- densities and samplers ----------------------------------------------------------------------------------------

// The rule of an operator whose tensors broadcast. Keys and gradients have all leading dimensions already.
class RowRule : public c10::OperatorKernel {
 public:
  // Result i has the shape to which the arguments at the positions gradients_of[i] broadcast. By default, it has the
  // leading dimensions of all arguments.
  explicit RowRule(std::vector<std::vector<size_t>> gradients_of) : gradients_of_(std::move(gradients_of)) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
    Level level;
    const auto& arguments = op.schema().arguments();
    const auto given = torch::jit::last(*stack, arguments.size());
    std::vector<int64_t> dims(arguments.size());
    for (size_t i = 0; i < arguments.size(); ++i) {
      if (given[i].isTensor()) {
        level.add(given[i].toTensor());
        const std::string& name = arguments[i].name();
        dims[i] = name == "key" || name.rfind("grad", 0) == 0 ? 0 : given[i].toTensor().dim();
      }
    }
    const int64_t most = *std::max_element(dims.begin(), dims.end());
    for (size_t i = 0; i < arguments.size(); ++i) {
      if (given[i].isTensor()) {
        torch::jit::peek(*stack, i, arguments.size()) = level.leading(given[i].toTensor(), dims[i] > 0 ? most : 0);
      }
    }
    op.callBoxed(stack);
    const size_t results = op.schema().returns().size();
    for (size_t i = 0; i < results; ++i) {
      c10::IValue& result = torch::jit::peek(*stack, i, results);
      Tensor tensor = result.toTensor();
      if (!gradients_of_.empty()) {
        int64_t owner = 0;
        for (const size_t position : gradients_of_[i]) {
          owner = std::max(owner, dims[position]);
        }
        while (tensor.dim() > 1 + owner) {
          tensor = tensor.squeeze(1);
        }
      }
      result = level.result(tensor);
    }
  }

 private:
  const std::vector<std::vector<size_t>> gradients_of_;
};

torch::CppFunction row_rule(std::vector<std::vector<size_t>> gradients_of = {}) {
  return torch::CppFunction::makeFromBoxedFunctor(std::make_unique<RowRule>(std::move(gradients_of)));
}

Tensor binarize_batch(const Tensor& grey, const Tensor& key, int64_t white, const OptionalTensor& index,
                      std::optional<at::ScalarType> dtype) {
  const auto rule = [&](const Level& level) {
    const Tensor greys = level.leading(grey), keys = level.leading(key);
    const OptionalTensor indices = index ? OptionalTensor(level.leading(*index)) : std::nullopt;
    Tensors drawn;
    for (int64_t i = 0; i < greys.size(0); ++i) {
      const OptionalTensor of_member = indices ? OptionalTensor(indices->select(0, i)) : std::nullopt;
      drawn.push_back(binarize().call(greys.select(0, i), keys.select(0, i), white, of_member, dtype));
    }
    return level.result(at::stack(drawn));
  };
  return batched(rule, grey, key, white, index, dtype);
}

// ---- layers --------------------------------------------------------------------------------------------------------

// Returns [N, *B, D] as [N, R, D].
Tensor rows(const Tensor& tensor) { return tensor.dim() == 2 ? tensor.unsqueeze(1) : tensor.flatten(1, -2); }

// Returns [N, R, D] as [N, *B, D], where `like` is [N, *B, any].
Tensor in_shape_of(const Tensor& rows, const Tensor& like) {
  auto shape = like.sym_sizes().vec();
  shape.back() = rows.sym_size(-1);
  return rows.reshape_symint(shape);
}

// Returns g^T h for each member, [N, D, H].
Tensor weight_gradient(const Tensor& g, const Tensor& h) {  // [N, R, D], [N, R, H]
  return g.sym_size(1) == 1 ? g.transpose(1, 2) * h : at::bmm(g.transpose(1, 2), h);
}

// Returns g weight for each member, [N, R, H].
Tensor input_gradient(const Level& level, const Tensor& g, const Tensor& weight) {  // [N, R, D], [D, H] each
  if (level.has(weight)) {
    return at::bmm(g, level.leading(weight).to(g.scalar_type()));
  }
  return in_shape_of(at::mm(g.flatten(0, 1), weight.to(g.scalar_type())), g);
}

// Returns h weight^T + bias for each member, [N, *B, D]. h is [N, *B, H].
Tensor layer_output(const Level& level, const Tensor& h, const Tensor& weight, const Tensor& bias) {
  const auto type = h.scalar_type();
  if (!level.has(weight) && !level.has(bias)) {
    return mlp().call(h, {weight.to(type)}, {bias.to(type)}, std::nullopt, std::nullopt);
  }
  const Tensor of_rows =
      at::baddbmm(level.leading(bias).to(type).unsqueeze(1), rows(h), level.leading(weight).to(type).transpose(1, 2));
  return in_shape_of(of_rows, h);
}

// Returns the output of each layer, [N, *B, D].
Tensors layer_outputs(const Level& level, const Tensor& h, at::TensorList weights, at::TensorList biases,
                      OptionalName activation, OptionalName output_activation) {
  const at::ScalarType type = promoted(h, weights, biases);
  Tensors outputs;
  Tensor y = level.leading(h).to(compute_dtype(type));
  for (size_t l = 0; l < weights.size(); ++l) {
    y = activated(layer_activation(l, weights.size(), activation, output_activation),
                  layer_output(level, y, weights[l], biases[l]));
    outputs.push_back(y.to(type));
  }
  return outputs;
}

Tensor mlp_batch(const Tensor& h, at::TensorList weights, at::TensorList biases, OptionalName activation,
                 OptionalName output_activation) {
  const auto rule = [&](const Level& level) {
    const bool shares_weights = !level.has(weights) && !level.has(biases);
    return level.result(shares_weights
                            ? mlp().call(level.leading(h), weights, biases, activation, output_activation)
                            : layer_outputs(level, h, weights, biases, activation, output_activation).back());
  };
  return batched(rule, h, weights, biases, activation, output_activation);
}

std::tuple<Tensor, Tensors> mlp_with_hidden_batch(const Tensor& h, at::TensorList weights, at::TensorList biases,
                                                  OptionalName activation, OptionalName output_activation) {
  const auto rule = [&](const Level& level) -> std::tuple<Tensor, Tensors> {
    Tensor output;
    Tensors hidden;
    if (level.has(weights) || level.has(biases)) {
      hidden = layer_outputs(level, h, weights, biases, activation, output_activation);
      output = hidden.back();
      hidden.pop_back();
    } else {
      std::tie(output, hidden) =
          mlp_with_hidden().call(level.leading(h), weights, biases, activation, output_activation);
    }
    for (Tensor& tensor : hidden) {
      const c10::SymInt columns = tensor.sym_size(-1);
      tensor = tensor.reshape_symint({level.size(), output.sym_numel() / level.size() / output.sym_size(-1), columns});
    }
    return {level.result(output), level.results(hidden)};
  };
  return batched(rule, h, weights, biases, activation, output_activation);
}

std::tuple<Tensor, Tensors, Tensors> mlp_backward_batch(const Tensor& grad, const Tensor& output, at::TensorList hidden,
                                                        const Tensor& h, at::TensorList weights, at::TensorList biases,
                                                        OptionalName activation, OptionalName output_activation,
                                                        bool with_grad_h, bool with_grad_weights) {
  const auto rule = [&](const Level& level) -> std::tuple<Tensor, Tensors, Tensors> {
    const size_t layers = weights.size();
    const auto type = grad.scalar_type();
    const Tensor input = level.leading(h);
    Tensors given = {rows(input)};  // each layer's input, then the output
    for (const Tensor& tensor : hidden) {
      given.push_back(level.leading(tensor));
    }
    given.push_back(rows(level.leading(output)));
    for (Tensor& tensor : given) {
      tensor = tensor.to(compute_dtype(type));
    }
    Tensors of_weights(layers), of_biases(layers);
    Tensor upstream = rows(level.leading(grad)).to(compute_dtype(type));
    for (size_t l = layers; l-- > 0;) {
      const Tensor g =
          gradient_of_products(layer_activation(l, layers, activation, output_activation), upstream, given[l + 1]);
      of_weights[l] = with_grad_weights ? weight_gradient(g, given[l]).to(type)
                                        : at::zeros_symint({level.size(), 0, weights[l].sym_size(1)}, grad.options());
      of_biases[l] = g.sum(1).to(type);
      if (l > 0 || with_grad_h) {
        upstream = input_gradient(level, g, weights[l]);
      }
    }
    const Tensor grad_h = with_grad_h ? in_shape_of(upstream, input).to(type)
                                      : at::zeros_symint({level.size(), 0, h.sym_size(-1)}, grad.options());
    return {level.result(grad_h), level.results(of_weights), level.results(of_biases)};
  };
  return batched(rule, grad, output, hidden, h, weights, biases, activation, output_activation, with_grad_h,
                 with_grad_weights);
}

// ---- Bernoulli heads -----------------------------------------------------------------------------------------------

// The operands of a head that all have the batch as a leading dimension.
struct HeadBatch {
  at::ScalarType compute;
  bool shares_weights;
  Tensor h;                 // [N, *S, *B, H]
  Tensor x;                 // [N, *B, D]
  c10::SymDimVector batch;  // [N, *S, *B]

  HeadBatch(const Level& level, const Tensor& h_in, const Tensor& weight, const Tensor& bias, const Tensor& x_in)
      : compute(compute_dtype(promoted(h_in, weight, bias))),
        shares_weights(!level.has(weight) && !level.has(bias)),
        h(level.leading(h_in, std::max(h_in.dim(), x_in.dim()))),
        x(level.leading(x_in, std::max(h_in.dim(), x_in.dim()))),
        batch(at::infer_size_symdimvector(h.sym_sizes().slice(0, h.dim() - 1), x.sym_sizes().slice(0, x.dim() - 1))) {}

  // Returns [.., last], broadcast to the whole batch.
  Tensor in_batch(const Tensor& tensor) const {
    auto shape = batch;
    shape.push_back(tensor.sym_size(-1));
    return tensor.expand_symint(shape);
  }
};

Tensor linear_bernoulli_log_prob_batch(const Tensor& h, const Tensor& weight, const Tensor& bias, const Tensor& x,
                                       std::optional<bool> recompute) {
  const auto rule = [&](const Level& level) {
    const HeadBatch of(level, h, weight, bias, x);
    return level.result(of.shares_weights
                            ? linear_bernoulli_log_prob().call(of.h, weight, bias, of.x, recompute)
                            : bernoulli_log_prob().call(layer_output(level, of.h.to(of.compute), weight, bias), of.x));
  };
  return batched(rule, h, weight, bias, x, recompute);
}

Pair linear_bernoulli_log_prob_and_logits_batch(const Tensor& h, const Tensor& weight, const Tensor& bias,
                                                const Tensor& x, int64_t kept_bytes) {
  const auto rule = [&](const Level& level) -> Pair {
    const HeadBatch of(level, h, weight, bias, x);
    if (of.shares_weights) {
      const auto [log_prob, logits] = linear_bernoulli_log_prob_and_logits().call(of.h, weight, bias, of.x, kept_bytes);
      const c10::SymInt kept = logits.sym_size(0) / level.size();
      return {level.result(log_prob), level.result(logits.reshape_symint({level.size(), kept, logits.sym_size(1)}))};
    }
    const Tensor logits = layer_output(level, of.h.to(of.compute), weight, bias);
    const Tensor none = at::zeros_symint({level.size(), 0, logits.sym_size(-1)}, logits.options());
    return {level.result(bernoulli_log_prob().call(logits, of.x)), level.result(none)};
  };
  return batched(rule, h, weight, bias, x, kept_bytes);
}

Triple linear_bernoulli_log_prob_backward_batch(const Tensor& grad, const Tensor& h, const Tensor& weight,
                                                const Tensor& bias, const Tensor& x, const OptionalTensor& logits,
                                                bool with_grad_h, bool with_grad_weight) {
  const auto rule = [&](const Level& level) -> Triple {
    const HeadBatch of(level, h, weight, bias, x);
    const auto type = promoted(h, weight, bias);
    const Tensor input = of.h.to(of.compute);
    const bool is_kept = logits && logits->sym_size(0) > 0;
    const Tensor a = is_kept ? level.leading(*logits) + level.leading(bias).to(of.compute).unsqueeze(1)
                             : layer_output(level, input, weight, bias);
    const Tensor whole = is_kept ? in_shape_of(a, of.in_batch(of.h)) : of.in_batch(a);
    const Tensor upstream = level.leading(grad, of.batch.size() - 1).expand_symint(of.batch);
    const Tensor g = rows(bernoulli_log_prob_backward().call(upstream, whole, of.x));
    const auto none = [&] { return at::zeros_symint({level.size(), 0, h.sym_size(-1)}, h.options().dtype(type)); };
    const Tensor grad_h =
        with_grad_h ? in_shape_of(input_gradient(level, g, weight), of.in_batch(of.h)).to(type) : none();
    const Tensor grad_weight = with_grad_weight ? weight_gradient(g, rows(of.in_batch(input))).to(type) : none();
    return {level.result(grad_h), level.result(grad_weight), level.result(g.sum(1).to(type))};
  };
  return batched(rule, grad, h, weight, bias, x, logits, with_grad_h, with_grad_weight);
}

Tensor linear_bernoulli_sample_batch(const Tensor& h, const Tensor& weight, const Tensor& bias, const Tensor& key,
                                     std::optional<at::ScalarType> dtype) {
  const auto rule = [&](const Level& level) {
    const auto type = promoted(h, weight, bias);
    const Tensor logits = layer_output(level, level.leading(h).to(compute_dtype(type)), weight, bias);
    return level.result(
        bernoulli_sample().call(logits, level.leading(key), c10::SymIntArrayRef(), dtype.value_or(type)));
  };
  return batched(rule, h, weight, bias, key, dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(wakesleep_ext, FuncTorchBatched, m) {
  for (const char* op : {"gaussian_rsample", "gaussian_rsample_log_prob", "gaussian_rsample_backward",
                         "bernoulli_sample", "gaussian_log_prob", "standard_gaussian_log_prob", "gaussian_kl",
                         "gaussian_kl_between", "bernoulli_log_prob"}) {
    m.impl(op, row_rule());
  }
  m.impl("gaussian_log_prob_backward", row_rule({{1, 2}, {1, 2, 3}}));
  m.impl("standard_gaussian_log_prob_backward", row_rule({{1}}));
  m.impl("gaussian_kl_backward", row_rule({{1, 2}}));
  m.impl("gaussian_kl_between_backward", row_rule({{1, 2, 3, 4}, {3, 4}}));
  m.impl("bernoulli_log_prob_backward", row_rule({{1}}));
  m.impl("binarize", binarize_batch);
  m.impl("mlp", mlp_batch);
  m.impl("mlp_with_hidden", mlp_with_hidden_batch);
  m.impl("mlp_backward", mlp_backward_batch);
  m.impl("linear_bernoulli_log_prob", linear_bernoulli_log_prob_batch);
  m.impl("linear_bernoulli_log_prob_and_logits", linear_bernoulli_log_prob_and_logits_batch);
  m.impl("linear_bernoulli_log_prob_backward", linear_bernoulli_log_prob_backward_batch);
  m.impl("linear_bernoulli_sample", linear_bernoulli_sample_batch);
}

}  // namespace wakesleep::autograd
