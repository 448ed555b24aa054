// Linear layers with something done to their result, a product h weight^T + bias, while it is in cache: checked
// operands of a call, the loop over chunks of rows, and what the gradients of such layers have in common.
//
// The products are the platform's, of h and weight alone. The row kernels add the bias as they read, so that nothing
// passes over the products for its sake. A type of 16 bits is multiplied as it is on a GPU, whose tensor cores
// accumulate in float32, and in float32 on a CPU; results are float32 either way, and so are the sums of gradients.
#pragma once

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "geometry.h"

namespace wakesleep {

constexpr int64_t kMiB = 1 << 20;

// What stays in cache: the second level of a CPU's cores, that of a GPU.
inline int64_t cached_bytes(at::Device device) { return device.is_cuda() ? 16 * kMiB : at::get_num_threads() * kMiB; }

// oneDNN's x weight^T, if this torch has it. On a processor for whom the platform's BLAS has no AVX-512, it multiplies
// twice as fast; where the BLAS has, as fast.
using OneDnnLinear = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                                std::string_view, c10::List<std::optional<at::Scalar>>,
                                std::optional<std::string_view>);
inline const std::optional<c10::TypedOperatorHandle<OneDnnLinear>>& onednn_linear() {
  static const auto found = []() -> std::optional<c10::TypedOperatorHandle<OneDnnLinear>> {
    const auto op = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    return op ? std::optional(op->typed<OneDnnLinear>()) : std::nullopt;
  }();
  return found;
}

// Whether a [M, N] is stored row by row or column by column, maybe with gaps.
inline bool is_plain(const at::Tensor& a) {
  const auto M = a.size(0), N = a.size(1), row = a.stride(0), column = a.stride(1);
  return (column == 1 && row >= std::max<int64_t>(1, N)) || (row == 1 && column >= std::max<int64_t>(1, M));
}

// a b, in the type `type`: that of a and b, or float32 for half types.
inline at::Tensor product(const at::Tensor& a, const at::Tensor& b, at::ScalarType type) {
  if (a.is_cuda()) {
    return type == a.scalar_type() ? at::mm(a, b) : at::mm(a, b, type);
  }
  constexpr int64_t kWorthwhile = 1 << 20;  // below so many multiplications its calls take longer to prepare
  const bool by_onednn = a.is_cpu() && a.scalar_type() == at::kFloat && a.numel() * b.size(1) >= kWorthwhile &&
                         is_plain(a) && is_plain(b) && at::globalContext().userEnabledMkldnn() && onednn_linear();
  const c10::List<std::optional<at::Scalar>> no_scalars;
  return (by_onednn ? onednn_linear()->call(a, b.t(), {}, "none", no_scalars, {}) : at::mm(a, b)).to(type);
}

// Rows first .. first + count of a tensor; the tensor itself if these are all, since a view takes as long to make as a
// small chunk to compute.
inline at::Tensor rows_of(const at::Tensor& tensor, int64_t first, int64_t count) {
  return count == tensor.size(0) ? tensor : tensor.narrow(0, first, count);
}

struct Linear {
  // The products are what the backend makes of them: autograd and autocast have had their say.
  const c10::DeviceGuard device;
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};

  const char* op;
  at::ScalarType dtype;    // of the parameters, promoted
  at::ScalarType compute;  // of products, and of sums of gradients
  at::ScalarType operand;  // of what is multiplied
  at::Tensor weight;       // [D, H]
  at::Tensor bias;         // [D]
  int64_t H, D;

  Linear(const char* op_in, const at::Tensor& h, const at::Tensor& weight_in, const at::Tensor& bias_in)
      : device(h.device()), op(op_in) {
    const Argument h_argument = {"h", h}, weight_argument = {"weight", weight_in}, bias_argument = {"bias", bias_in};
    for (const Argument& argument : {h_argument, weight_argument, bias_argument}) {
      check_floating(op, argument);
      check_same_device(op, h_argument, argument);
    }
    check_event(op, h_argument);
    TORCH_CHECK_VALUE(weight_in.dim() == 2, op, ": expected weight to have shape [D, H], got ", weight_in.sizes());
    D = weight_in.size(0);
    H = weight_in.size(1);
    TORCH_CHECK_VALUE(h.size(-1) == H, op, ": expected the last dimension of h to be ", H, ", that of weight, got ",
                      h.size(-1));
    TORCH_CHECK_VALUE(bias_in.dim() == 1 && bias_in.size(0) == D, op, ": expected bias to have shape [", D,
                      "], one for each row of weight, got ", bias_in.sizes());
    dtype = c10::promoteTypes(c10::promoteTypes(h.scalar_type(), weight_in.scalar_type()), bias_in.scalar_type());
    compute = at::toOpMathType(dtype);
    operand = h.is_cuda() ? dtype : compute;
    weight = weight_in.to(operand);
    bias = bias_in.to(compute).contiguous();
  }

  // Rows in a chunk: what stays in cache, but enough that products do not suffer.
  int64_t chunk_rows() const {
    constexpr int64_t kFewest = 32;
    const int64_t row_bytes = std::max<int64_t>(1, D) * static_cast<int64_t>(c10::elementSize(compute));
    return std::max(kFewest, cached_bytes(weight.device()) / row_bytes / kFewest * kFewest);
  }

  // A buffer for a chunk of N rows.
  at::Tensor chunk(int64_t N, at::ScalarType type) const {  // [rows, D]
    return at::empty({std::min(N, chunk_rows()), D}, weight.options().dtype(type));
  }

  // body(first row, rows of h [rows, H]) for every chunk of so many rows of h [N, H].
  template <typename Body>
  void for_chunks(const at::Tensor& h, int64_t rows, const Body& body) const {
    const int64_t N = h.size(0);
    for (int64_t first = 0; first < N; first += rows) {
      body(first, rows_of(h, first, std::min(rows, N - first)).to(operand));
    }
  }

  // body(first row, rows of h [rows, H], their products with weight [rows, D]) for every chunk of h [N, H]; or for all
  // rows at once, of products that are to be kept.
  template <typename Body>
  void for_products(const at::Tensor& h, bool at_once, const Body& body) const {
    for_chunks(h, at_once ? h.size(0) : chunk_rows(), [&](int64_t first, const at::Tensor& h_rows) {
      body(first, h_rows, product(h_rows, weight.t(), compute));
    });
  }
};

// The gradients of h, weight and bias, from that of the layer's result, chunk by chunk.
struct LinearGradients {
  at::Tensor h;       // [N, H], or without elements where it is not wanted
  at::Tensor weight;  // [D, H], or without elements where it is not wanted
  at::Tensor bias;    // [D]

  LinearGradients(const Linear& layer, int64_t N, int64_t piece_rows, bool with_h, bool with_weight)
      : layer_(layer), piece_rows_(piece_rows), with_h_(with_h), with_weight_(with_weight) {
    const auto wide = layer.weight.options().dtype(layer.compute);
    h = at::empty({with_h ? N : 0, layer.H}, wide.dtype(layer.dtype));
    weight = at::empty({with_weight ? layer.D : 0, layer.H}, wide);
    bias = at::empty({layer.D}, wide);
    if (N == 0) {
      weight.zero_();
      bias.zero_();
    }
  }

  // Of the chunk that begins with row `first`, whose rows of h are h_rows: write(sums [pieces, D]) puts the gradient of
  // its result into `grad` [rows, D], and its sums over every `piece_rows` rows into `sums`.
  template <typename Write>
  void add(int64_t first, const at::Tensor& h_rows, const at::Tensor& grad, const Write& write) {
    const int64_t count = (grad.size(0) + piece_rows_ - 1) / piece_rows_;
    const bool whole = first == 0 && count == 1;
    const at::Tensor sums = whole ? bias.unsqueeze(0) : at::empty({count, layer_.D}, bias.options());
    write(sums);
    if (!whole) {
      first == 0 ? at::sum_out(bias, sums, 0) : bias.add_(at::sum(sums, 0));
    }
    if (with_h_) {
      const at::Tensor of_rows = product(grad, layer_.weight, layer_.dtype);
      grad.size(0) == h.size(0) ? void(h = of_rows) : void(h.narrow(0, first, grad.size(0)).copy_(of_rows));
    }
    if (with_weight_) {
      const at::Tensor of_rows = product(grad.t(), h_rows, layer_.compute);
      first == 0 ? void(weight = of_rows) : void(weight.add_(of_rows));
    }
  }

  // In the dtype of the parameters; that of h has its leading dimensions, if it is wanted.
  std::tuple<at::Tensor, at::Tensor, at::Tensor> result(at::IntArrayRef batch) const {
    return {with_h_ ? h.view(concat(batch, {layer_.H})) : h, weight.to(layer_.dtype), bias.to(layer_.dtype)};
  }

 private:
  const Linear& layer_;
  int64_t piece_rows_;
  bool with_h_, with_weight_;
};

}  // namespace wakesleep
