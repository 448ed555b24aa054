// Linear layers with an operation on the product h weight^T + bias while it is in cache: checked operands of a call,
// the loop over chunks of rows, and the gradients that such layers share.
//
// For small networks, the overhead of a call counts. So a tensor is viewed, converted or allocated only if that changes
// something.
//
// The backend multiplies h and weight alone. The row kernels add the bias as they read the products, which saves a
// pass. A GPU multiplies 16-bit types as they are, and its tensor cores accumulate in float32. A CPU multiplies them in
// float32. Products are float32 either way, and so are the sums of gradients.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstdlib>

#include "geometry.h"

namespace wakesleep {

constexpr int64_t kMiB = 1 << 20;

// Returns the bytes that stay in cache: in the L2 of a CPU's cores, or of a GPU.
inline int64_t cached_bytes(at::Device device) { return device.is_cuda() ? 16 * kMiB : at::get_num_threads() * kMiB; }

// Returns tensor.to(type). to() takes half a microsecond to find out that there is nothing to do.
inline at::Tensor in_type(const at::Tensor& tensor, at::ScalarType type) {
  return tensor.scalar_type() == type ? tensor : tensor.to(type);
}

// Returns the largest batch for a backend's own kernels: WAKESLEEP_SMALL_BATCH if set, otherwise the measured limit.
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

// The base class of kernels that multiply with the BLAS. Kernels that compute whole layers of small batches set
// kOwnSmallBatches and define small_batch_limit().
struct PlatformProducts {
  static constexpr bool kOwnSmallBatches = false;

  // Returns a b in `type`. On a GPU, half operands can give a float32 result.
  static at::Tensor product(const at::Tensor& a, const at::Tensor& b, at::ScalarType type) {
    return a.is_cuda() && type != a.scalar_type() ? aten::mm(a, b, type) : in_type(a.mm(b), type);
  }

  // sum += a b.
  static void add_product(const at::Tensor& sum, const at::Tensor& a, const at::Tensor& b) {
    sum.scalar_type() == a.scalar_type() ? sum.addmm_(a, b) : sum.add_(product(a, b, sum.scalar_type()));
  }
};

// Returns rows first .. first + count - 1. For all rows it returns the tensor itself, since a view takes as long as a
// small chunk.
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

// A layer's parameters, in the dtypes of its computation.
struct Layer {
  at::Tensor weight;  // [D, H]
  at::Tensor bias;    // [D]
  int64_t H, D;
};

// A call of an op that applies layers in sequence.
struct LinearCall {
  // Products skip autograd and autocast, which have run before this call.
  const c10::DeviceGuard device;
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};

  const char* op;
  at::ScalarType dtype;    // promoted from h and the parameters
  at::ScalarType compute;  // of products, and of sums of gradients
  at::ScalarType operand;  // of the operands of products

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

  // Returns the rows in a chunk of `columns` columns: as many as stay in cache, but enough for an efficient GEMM.
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

  // Calls body(first row, rows of h [rows, H], their products with weight [rows, D]) for every chunk of h [N, H]. There
  // is one chunk if `at_once`, as for products that are kept, or if the batch is small.
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

  // Returns the part of the tensor that takes `rows`, from row `first` on.
  at::Tensor place(int64_t first, const at::Tensor& rows) {
    if (!tensor.defined()) {
      tensor = aten::empty({N, rows.size(1)}, rows.options().dtype(dtype));
    }
    return rows_of(tensor, first, rows.size(0));
  }

  // Returns the tensor, or one without rows if there was no chunk.
  at::Tensor all(int64_t D, const at::TensorOptions& options) const {
    return tensor.defined() ? tensor : aten::empty({0, D}, options.dtype(dtype));
  }
};

// The gradients of a layer's weight and bias, computed from that of its products, chunk by chunk.
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

  // Adds the chunk from row `first` on, with layer inputs h [rows, H]. write(sums [pieces, D]) must put the gradient of
  // its products into `grad` [rows, D], and the sums over every `piece_rows` rows into `sums`.
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
