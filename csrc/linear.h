// Linear layers that apply an operation to h weight^T + bias while this sum is in cache. This file has the checked
// operands of a call, the loop over chunks of rows, and the gradients of weight and bias.
//
// For small networks, the overhead of a call matters. So the code avoids every view, conversion and allocation that is
// not needed.
//
// The backend only multiplies h by weight^T. The row kernels add the bias when they read the product, which saves a
// pass over memory. A GPU multiplies 16-bit operands directly, and its tensor cores accumulate in float32. A CPU
// converts 16-bit operands to float32 first. In both cases, the product and the sums of gradients are float32.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstdlib>

#include "geometry.h"

namespace wakesleep {

constexpr int64_t kMiB = 1 << 20;

// Returns the number of bytes that stay in the L2 caches of the CPU's cores, or in the L2 cache of the GPU.
inline int64_t cached_bytes(at::Device device) { return device.is_cuda() ? 16 * kMiB : at::get_num_threads() * kMiB; }

// Returns tensor.to(type), but does not call to() if the tensor already has this type. The call would take half a
// microsecond.
inline at::Tensor in_type(const at::Tensor& tensor, at::ScalarType type) {
  return tensor.scalar_type() == type ? tensor : tensor.to(type);
}

// Returns the largest batch size for which a backend uses its own GEMM kernels. If WAKESLEEP_SMALL_BATCH is set, its
// value is the limit. Otherwise, the limit is the measured one.
inline int64_t small_batch_limit(int64_t measured) {
  const char* chosen = std::getenv("WAKESLEEP_SMALL_BATCH");
  if (chosen == nullptr) {
    return measured;
  }
  char* end = nullptr;
  const int64_t rows = std::strtoll(chosen, &end, 10);
  TORCH_CHECK_VALUE(end != chosen && *end == '\0', "expected WAKESLEEP_SMALL_BATCH to be a number, got '", chosen, "'");
  return rows;
}

// The base class of kernels that multiply with the BLAS. Kernels that also implement complete layers for small batches
// set kOwnSmallBatches and define small_batch_limit().
struct PlatformProducts {
  static constexpr bool kOwnSmallBatches = false;

  // Returns the matrix product a b in dtype `type`. On a GPU, 16-bit operands can yield a float32 result.
  static at::Tensor product(const at::Tensor& a, const at::Tensor& b, at::ScalarType type) {
    return a.is_cuda() && type != a.scalar_type() ? aten::mm(a, b, type) : in_type(a.mm(b), type);
  }

  // Adds the matrix product a b to `sum` in place.
  static void add_product(const at::Tensor& sum, const at::Tensor& a, const at::Tensor& b) {
    sum.scalar_type() == a.scalar_type() ? sum.addmm_(a, b) : sum.add_(product(a, b, sum.scalar_type()));
  }
};

// Returns rows first .. first + count - 1. If these are all rows, it returns the tensor itself, because creating a view
// takes as long as processing a small chunk.
inline at::Tensor rows_of(const at::Tensor& tensor, int64_t first, int64_t count) {
  return count == tensor.size(0) ? tensor : tensor.narrow(0, first, count);
}

// Returns tensor [*B, D] as [N, D].
inline at::Tensor as_rows(const at::Tensor& tensor, int64_t N) {
  return tensor.dim() == 2 ? tensor : tensor.reshape({N, tensor.size(-1)});
}

// Returns rows [N, D] as [*batch, D].
inline at::Tensor in_batch(const at::Tensor& rows, at::IntArrayRef batch) {
  return batch.size() == 1 ? rows : rows.view(concat(batch, {rows.size(-1)}));
}

// The parameters of a layer, converted to the dtypes in which the layer computes.
struct Layer {
  at::Tensor weight;  // [D, H]
  at::Tensor bias;    // [D]
  int64_t H, D;
};

// A call of an op that applies one or more layers in sequence.
struct LinearCall {
  // The matrix products bypass autograd and autocast, which were applied before this call.
  const c10::DeviceGuard device;
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};

  const char* op;
  at::ScalarType dtype;    // promoted dtype of h and the parameters
  at::ScalarType compute;  // dtype of products and of gradient sums
  at::ScalarType operand;  // dtype of the operands of products

  LinearCall(const char* op_in, const at::Tensor& h, at::TensorList weights, at::TensorList biases)
      : device(h.device()), op(op_in), dtype(h.scalar_type()) {
    const bool one = weights.size() == 1;
    const Argument h_argument = {"h", h};
    check_floating(op, h_argument);
    check_event(op, h_argument);
    TORCH_CHECK_VALUE(!weights.empty(), op, ": expected weights to have at least one layer, got none");
    TORCH_CHECK_VALUE(weights.size() == biases.size(), op, ": expected as many biases as weights, ", weights.size(),
                      ", got ", biases.size());
    for (size_t l = 0; l < weights.size(); ++l) {
      const auto index = one ? std::nullopt : std::optional(l);
      const Argument weight = {one ? "weight" : "weights", weights[l], index};
      const Argument bias = {one ? "bias" : "biases", biases[l], index};
      for (const Argument& argument : {weight, bias}) {
        check_floating(op, argument);
        check_same_device(op, h_argument, argument);
        dtype = c10::promoteTypes(dtype, argument.tensor.scalar_type());
      }
      TORCH_CHECK_VALUE(weight.tensor.dim() == 2, op, ": expected ", weight, " to have shape [D, H], got ",
                        weight.tensor.sizes());
      const int64_t D = weight.tensor.size(0), H = weight.tensor.size(1);
      if (l == 0) {
        TORCH_CHECK_VALUE(h.size(-1) == H, op, ": expected the last dimension of h to be ", H, ", that of ", weight,
                          ", got ", h.size(-1));
      } else {
        TORCH_CHECK_VALUE(weights[l - 1].size(0) == H, op, ": expected ", weight, " to have ", weights[l - 1].size(0),
                          " columns, one for each row of the previous layer's weight, got ", H);
      }
      TORCH_CHECK_VALUE(bias.tensor.dim() == 1 && bias.tensor.size(0) == D, op, ": expected ", bias, " to have shape [",
                        D, "], one for each row of ", weight, ", got ", bias.tensor.sizes());
    }
    compute = at::toOpMathType(dtype);
    operand = h.is_cuda() ? dtype : compute;
  }

  Layer layer(const at::Tensor& weight, const at::Tensor& bias) const {
    return {in_type(weight, operand), in_type(bias, compute).contiguous(), weight.size(1), weight.size(0)};
  }

  // Returns the number of rows in a chunk with `columns` columns. The chunk fits in cache, unless the GEMM would then
  // have too few rows to be efficient.
  int64_t chunk_rows(int64_t columns) const {
    constexpr int64_t kFewest = 32;
    const int64_t row_bytes = std::max<int64_t>(1, columns) * static_cast<int64_t>(c10::elementSize(compute));
    return std::max(kFewest, cached_bytes(device.current_device()) / row_bytes / kFewest * kFewest);
  }

  // Calls body(first row, rows of h [rows, H]) for every chunk of `rows` rows of h [N, H].
  template <typename Body>
  void for_chunks(const at::Tensor& h, int64_t rows, const Body& body) const {
    const int64_t N = h.size(0);
    for (int64_t first = 0; first < N; first += rows) {
      body(first, in_type(rows_of(h, first, std::min(rows, N - first)), operand));
    }
  }
};

// A call with one layer.
struct Linear : LinearCall, Layer {
  Linear(const char* op_in, const at::Tensor& h, const at::Tensor& weight_in, const at::Tensor& bias_in)
      : LinearCall(op_in, h, weight_in, bias_in), Layer(layer(weight_in, bias_in)) {}

  int64_t chunk_rows() const { return LinearCall::chunk_rows(D); }

  // Calls body(first row, rows of h [rows, H], product of these rows and weight^T [rows, D]) for every chunk of h.
  // There is only one chunk if the batch is small or if `at_once` is true. A caller that keeps the product sets
  // `at_once`.
  template <typename Kernels, typename Body>
  void for_products(const at::Tensor& h, bool at_once, const Body& body) const {
    if constexpr (Kernels::kOwnSmallBatches) {
      if (h.size(0) <= Kernels::small_batch_limit()) {
        return body(0, h, Kernels::products(*this, h));
      }
    }
    for_chunks(h, at_once ? h.size(0) : chunk_rows(), [&](int64_t first, const at::Tensor& h_rows) {
      body(first, h_rows, Kernels::product(h_rows, weight.t(), compute));
    });
  }
};

// A tensor [N, D] that is assembled from chunks. A single chunk of the right dtype is stored without copying.
struct Rows {
  int64_t N;
  at::ScalarType dtype;
  at::Tensor tensor;

  void put(int64_t first, const at::Tensor& rows) {
    if (rows.size(0) == N && rows.scalar_type() == dtype) {
      tensor = rows;
    } else {
      place(first, rows).copy_(rows);
    }
  }

  // Returns the slice of the tensor, starting at row `first`, into which `rows` is written.
  at::Tensor place(int64_t first, const at::Tensor& rows) {
    if (!tensor.defined()) {
      tensor = aten::empty({N, rows.size(1)}, rows.options().dtype(dtype));
    }
    return rows_of(tensor, first, rows.size(0));
  }

  // Returns the tensor, or an empty tensor [0, D] if there was no chunk.
  at::Tensor all(int64_t D, const at::TensorOptions& options) const {
    return tensor.defined() ? tensor : aten::empty({0, D}, options.dtype(dtype));
  }
};

// The gradients of a layer's weight and bias. They are accumulated chunk by chunk from the gradient of the product h
// weight^T.
struct LayerGradients {
  at::Tensor weight;  // [D, H], or empty if not needed
  at::Tensor bias;    // [D]

  LayerGradients(const Layer& layer, int64_t N, int64_t piece_rows, bool with_weight)
      : piece_rows_(piece_rows), with_weight_(with_weight) {
    const auto wide = layer.bias.options();
    if (N == 0 || !with_weight) {
      weight = aten::zeros({with_weight ? layer.D : 0, layer.H}, wide);
    }
    bias = N == 0 ? aten::zeros({layer.D}, wide) : aten::empty({layer.D}, wide);
  }

  // Adds the gradients of the chunk that starts at row `first`, whose layer input is h [rows, H]. It calls write(sums
  // [pieces, D]), which must fill two tensors:
  //
  //   grad [rows, D]: the gradient of the product h weight^T;
  //   sums [pieces, D]: one sum for every `piece_rows` rows of grad.
  template <typename Kernels, typename Write>
  void add(int64_t first, const at::Tensor& h, const at::Tensor& grad, const Write& write) {
    const int64_t count = (grad.size(0) + piece_rows_ - 1) / piece_rows_;
    const bool whole = first == 0 && count == 1;
    const at::Tensor sums = whole ? bias.unsqueeze(0) : aten::empty({count, bias.size(0)}, bias.options());
    write(sums);
    if (!whole) {
      first == 0 ? aten::sum_rows(sums, bias) : bias.add_(sums.sum(0));
    }
    if (with_weight_) {
      first == 0 ? void(weight = Kernels::product(grad.t(), h, bias.scalar_type()))
                 : Kernels::add_product(weight, grad.t(), h);
    }
  }

 private:
  int64_t piece_rows_;
  bool with_weight_;
};

}  // namespace wakesleep
