// Linear layers with something done to their result, a product h weight^T + bias, while it is in cache: checked
// operands of a call, the loop over chunks of rows, and what the gradients of such layers have in common.
//
// The products are the platform's, of h and weight alone. The row kernels add the bias as they read, so that nothing
// passes over the products for its sake. A type of 16 bits is multiplied as it is on a GPU, whose tensor cores
// accumulate in float32, and in float32 on a CPU; results are float32 either way, and so are the sums of gradients.
#pragma once

#include <ATen/Parallel.h>
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

// to = a b, or to += a b, in the type of `to`.
inline void multiply(at::Tensor to, const at::Tensor& a, const at::Tensor& b, bool add = false) {
  if (to.scalar_type() == a.scalar_type()) {
    add ? to.addmm_(a, b) : at::mm_out(to, a, b);
  } else if (a.is_cuda()) {
    add ? to.add_(at::mm(a, b, to.scalar_type())) : at::mm_out(to, a, b, to.scalar_type());
  } else {
    add ? to.add_(at::mm(a, b)) : to.copy_(at::mm(a, b));
  }
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

  // A buffer for a chunk of N rows; each begins on a boundary of 64 bytes.
  at::Tensor chunk(int64_t N, at::ScalarType type) const {  // [rows, D]
    constexpr int64_t kBoundary = 64;
    const int64_t per_boundary = kBoundary / static_cast<int64_t>(c10::elementSize(type));
    const int64_t stride = (D + per_boundary - 1) / per_boundary * per_boundary;
    const at::Tensor rows = at::empty({std::min(N, chunk_rows()), stride}, weight.options().dtype(type));
    return stride == D ? rows : rows.narrow(1, 0, D);
  }

  // body(first row, rows of h [rows, H]) for every chunk of h [N, H].
  template <typename Body>
  void for_chunks(const at::Tensor& h, const Body& body) const {
    const int64_t N = h.size(0), at_once = chunk_rows();
    for (int64_t first = 0; first < N; first += at_once) {
      body(first, rows_of(h, first, std::min(at_once, N - first)).to(operand));
    }
  }

  // body(first row, rows of h [rows, H], their products with weight [rows, D]) for every chunk of h [N, H]; the
  // products in their places in `kept` if it is [N, D], otherwise in a buffer.
  template <typename Body>
  void for_products(const at::Tensor& h, const at::Tensor& kept, const Body& body) const {
    const bool keeps = kept.defined() && kept.size(0) > 0;
    const at::Tensor buffer = keeps ? kept : chunk(h.size(0), compute);
    for_chunks(h, [&](int64_t first, const at::Tensor& h_rows) {
      const at::Tensor products = rows_of(buffer, keeps ? first : 0, h_rows.size(0));
      multiply(products, h_rows, weight.t());
      body(first, h_rows, products);
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
      multiply(rows_of(h, first, grad.size(0)), grad, layer_.weight);
    }
    if (with_weight_) {
      multiply(weight, grad.t(), h_rows, first > 0);
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
