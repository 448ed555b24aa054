// Linear layers with something done to their result, a product h weight^T + bias, while it is in cache: checked
// operands of a call, the loop over chunks of rows, and what the gradients of such layers have in common.
//
// For small networks, what a call costs besides its products is what counts. A tensor is viewed, converted or allocated
// here only where that changes something.
//
// The products are the backend's, of h and weight alone. The row kernels add the bias as they read, so that nothing
// passes over the products for its sake. A type of 16 bits is multiplied as it is on a GPU, whose tensor cores
// accumulate in float32, and in float32 on a CPU; results are float32 either way, and so are the sums of gradients.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstdlib>

#include "geometry.h"

namespace wakesleep {

constexpr int64_t kMiB = 1 << 20;

// What stays in cache: the second level of a CPU's cores, that of a GPU.
inline int64_t cached_bytes(at::Device device) { return device.is_cuda() ? 16 * kMiB : at::get_num_threads() * kMiB; }

// tensor.to(type), which takes half a microsecond to find out that there is nothing to do.
inline at::Tensor in_type(const at::Tensor& tensor, at::ScalarType type) {
  return tensor.scalar_type() == type ? tensor : tensor.to(type);
}

// Up to so many rows a backend's own kernels multiply, by measurement; the environment may know better.
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

// What kernels inherit whose products are the platform's. Those that make a whole layer of a small batch themselves say
// up to how many rows, small_batch_limit().
struct PlatformProducts {
  static constexpr bool kOwnSmallBatches = false;

  // a b, in the type `type`: from half types float32, to half types from float32.
  static at::Tensor product(const at::Tensor& a, const at::Tensor& b, at::ScalarType type) {
    return a.is_cuda() && type != a.scalar_type() ? aten::mm(a, b, type) : in_type(a.mm(b), type);
  }

  // sum += a b.
  static void add_product(const at::Tensor& sum, const at::Tensor& a, const at::Tensor& b) {
    sum.scalar_type() == a.scalar_type() ? sum.addmm_(a, b) : sum.add_(product(a, b, sum.scalar_type()));
  }
};

// Rows first .. first + count of a tensor; the tensor itself if these are all, since a view takes as long to make as a
// small chunk to compute.
inline at::Tensor rows_of(const at::Tensor& tensor, int64_t first, int64_t count) {
  return count == tensor.size(0) ? tensor : tensor.narrow(0, first, count);
}

// tensor [*B, D] as [N, D].
inline at::Tensor as_rows(const at::Tensor& tensor, int64_t N) {
  return tensor.dim() == 2 ? tensor : tensor.reshape({N, tensor.size(-1)});
}

// rows [N, D] as [*batch, D].
inline at::Tensor in_batch(const at::Tensor& rows, at::IntArrayRef batch) {
  return batch.size() == 1 ? rows : rows.view(concat(batch, {rows.size(-1)}));
}

// A layer as it is multiplied.
struct Layer {
  at::Tensor weight;  // [D, H]
  at::Tensor bias;    // [D]
  int64_t H, D;
};

// A call of an op that is made of layers, each of which gets what the one before returns.
struct LinearCall {
  // The products are what the backend makes of them: autograd and autocast have had their say.
  const c10::DeviceGuard device;
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};

  const char* op;
  at::ScalarType dtype;    // of the parameters, promoted
  at::ScalarType compute;  // of products, and of sums of gradients
  at::ScalarType operand;  // of what is multiplied

  LinearCall(const char* op_in, const at::Tensor& h, at::TensorList weights, at::TensorList biases)
      : device(h.device()), op(op_in), dtype(h.scalar_type()) {
    const bool one = weights.size() == 1;
    const Argument h_argument = {"h", h};
    check_floating(op, h_argument);
    check_event(op, h_argument);
    TORCH_CHECK_VALUE(!weights.empty(), op, ": expected weights to have one layer at least, got none");
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
                          " columns, one for each row of the weights before, got ", H);
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

  // Rows in a chunk of so many columns: what stays in cache, but enough that products do not suffer.
  int64_t chunk_rows(int64_t columns) const {
    constexpr int64_t kFewest = 32;
    const int64_t row_bytes = std::max<int64_t>(1, columns) * static_cast<int64_t>(c10::elementSize(compute));
    return std::max(kFewest, cached_bytes(device.current_device()) / row_bytes / kFewest * kFewest);
  }

  // body(first row, rows of h [rows, H]) for every chunk of so many rows of h [N, H].
  template <typename Body>
  void for_chunks(const at::Tensor& h, int64_t rows, const Body& body) const {
    const int64_t N = h.size(0);
    for (int64_t first = 0; first < N; first += rows) {
      body(first, in_type(rows_of(h, first, std::min(rows, N - first)), operand));
    }
  }
};

// One layer.
struct Linear : LinearCall, Layer {
  Linear(const char* op_in, const at::Tensor& h, const at::Tensor& weight_in, const at::Tensor& bias_in)
      : LinearCall(op_in, h, weight_in, bias_in), Layer(layer(weight_in, bias_in)) {}

  int64_t chunk_rows() const { return LinearCall::chunk_rows(D); }

  // body(first row, rows of h [rows, H], their products with weight [rows, D]) for every chunk of h [N, H]; or for all
  // rows at once, of products that are to be kept, or if the batch is small.
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

// A tensor [N, D] that comes chunk by chunk; if it comes in one, and as it should be, it is that.
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

  // Where rows first .. first + rows.size(0) go.
  at::Tensor place(int64_t first, const at::Tensor& rows) {
    if (!tensor.defined()) {
      tensor = aten::empty({N, rows.size(1)}, rows.options().dtype(dtype));
    }
    return rows_of(tensor, first, rows.size(0));
  }

  // The tensor; without rows where none have come.
  at::Tensor all(int64_t D, const at::TensorOptions& options) const {
    return tensor.defined() ? tensor : aten::empty({0, D}, options.dtype(dtype));
  }
};

// The gradients of a layer's weight and bias, from that of its products, chunk by chunk.
struct LayerGradients {
  at::Tensor weight;  // [D, H], or without elements where it is not wanted
  at::Tensor bias;    // [D]

  LayerGradients(const Layer& layer, int64_t N, int64_t piece_rows, bool with_weight)
      : piece_rows_(piece_rows), with_weight_(with_weight) {
    const auto wide = layer.bias.options();
    if (N == 0 || !with_weight) {
      weight = aten::zeros({with_weight ? layer.D : 0, layer.H}, wide);
    }
    bias = N == 0 ? aten::zeros({layer.D}, wide) : aten::empty({layer.D}, wide);
  }

  // Of the chunk that begins with row `first`, for which the layer gets h [rows, H]: write(sums [pieces, D]) puts the
  // gradient of its products into `grad` [rows, D], and its sums over every `piece_rows` rows into `sums`.
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
