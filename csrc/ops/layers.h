// Linear layers that apply an operation to h weight^T + bias while this sum is in cache. This file has the checked
// operands of a call, the loop over chunks of rows, and the gradients of a layer.
//
// For small networks, the overhead of a call matters. So the code avoids every view, conversion and allocation that is
// not needed.
//
// If the GEMM cannot add the bias and apply the activation, it only multiplies h by weight^T. The row kernels add the
// bias when they read the product, which saves a pass over memory. Sums of gradients are float32 on every device, and
// so are logits.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "gemm.h"
#include "geometry.h"

namespace wakesleep {

// Makes the torch operators that layers call bypass autograd and autocast, which were applied before.
struct BelowAutograd {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// ---- rows ----------------------------------------------------------------------------------------------------------

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

// A tensor [N, D] that is assembled from chunks. A single chunk of the right dtype is stored without copying.
struct Rows {
  int64_t N;
  at::ScalarType dtype;
  at::Tensor tensor = {};

  void put(int64_t first, const at::Tensor& rows) {
    if (rows.size(0) == N && rows.scalar_type() == dtype) {
      tensor = rows;
    } else {
      place(first, rows.sizes(), rows.options()).copy_(rows);
    }
  }

  // Returns the slice of the tensor, starting at row `first`, into which a chunk of shape [rows, D] is written.
  at::Tensor place(int64_t first, at::IntArrayRef shape, const at::TensorOptions& options) {
    if (!tensor.defined()) {
      tensor = at::empty({N, shape[1]}, options.dtype(dtype));
    }
    return rows_of(tensor, first, shape[0]);
  }

  // Returns the tensor, or an empty tensor [0, D] if there was no chunk.
  at::Tensor all(int64_t D, const at::TensorOptions& options) const {
    return tensor.defined() ? tensor : at::empty({0, D}, options.dtype(dtype));
  }
};

// ---- calls ---------------------------------------------------------------------------------------------------------

// The parameters of a layer, converted to the dtypes in which the layer computes.
struct Layer {
  at::Tensor weight;  // [D, H]
  at::Tensor bias;    // [D]
  int64_t H, D;
};

// Checks the operands of a call with one or more layers, and returns their promoted dtype.
at::ScalarType check_layers(const char* op, const at::Tensor& h, at::TensorList weights, at::TensorList biases);

// A call of an op that applies one or more layers in sequence.
struct LayerCall {
  const char* op;
  at::Device device;
  at::ScalarType dtype;    // promoted dtype of h and the parameters
  at::ScalarType compute;  // dtype of logits, hidden products and gradient sums
  at::ScalarType operand;  // dtype of the operands of products

  LayerCall(const char* op_in, const at::Tensor& h, at::TensorList weights, at::TensorList biases)
      : op(op_in), device(h.device()), dtype(check_layers(op, h, weights, biases)) {
    int64_t multiplications = 0;
    for (const at::Tensor& weight : weights) {
      multiplications += c10::multiply_integers(batch_sizes(h)) * weight.numel();
    }
    compute = compute_dtype(dtype);
    operand = operand_dtype(device, dtype, multiplications);
  }

  Layer layer(const at::Tensor& weight, const at::Tensor& bias) const {
    return {in_type(weight, operand), in_type(bias, compute).contiguous(), weight.size(1), weight.size(0)};
  }

  // Returns the number of rows in a chunk with `columns` columns. The chunk fits in the L2 caches of the CPU's cores or
  // in the L2 cache of the GPU, unless the GEMM would then have too few rows to be efficient.
  int64_t chunk_rows(int64_t columns) const;

  // Calls body(first row, rows of h [rows, H]) for every chunk of `rows` rows of h [N, H].
  template <typename Body>
  void for_chunks(const at::Tensor& h, int64_t rows, const Body& body) const {
    const int64_t N = h.size(0);
    for (int64_t first = 0; first < N; first += rows) {
      body(first, in_type(rows_of(h, first, std::min(rows, N - first)), operand));
    }
  }
};

// Returns the output [*B, D] of an MLP; see mlp.cpp.
at::Tensor mlp(const at::Tensor& h,     // [*B, H]
               at::TensorList weights,  // [D, H] each, where H is the D of the previous layer
               at::TensorList biases,   // [D] each
               std::optional<std::string_view> activation, std::optional<std::string_view> output_activation);

// ---- layers of small batches, computed at once ---------------------------------------------------------------------

// The operands of a layer, made contiguous and converted to one dtype for the kernels.
struct SmallBatch {
  at::Tensor h;       // [N, H]
  at::Tensor weight;  // [D, H]

  SmallBatch(const at::Tensor& h_in, const Layer& layer, at::ScalarType type)
      : h(h_in.to(type).contiguous()), weight(layer.weight.to(type).contiguous()) {}

  SmallBatchLayer layer() const { return {dtype_of(h), read(h), read(weight), h.size(0), h.size(1), weight.size(0)}; }

  template <typename Call>
  void compute(const Call& call) const {
    launch(h.device(), std::get<Kernel<Call>>(*backend_of(h.device()).small_batch), call);
  }
};

// ---- gradients -----------------------------------------------------------------------------------------------------

// The output of a layer, y = f(products + bias).
struct LayerOutput {
  Activation activation = Activation::identity;
  at::Tensor y = {};  // [N, D]; undefined if f is the identity
};

// The gradients of a layer's weight and bias, accumulated chunk by chunk from g, the gradient of the products h
// weight^T. A chunk takes two steps:
//
//   1. A row kernel writes g, and its sums over rows into the tensor that sums() returns.
//   2. add() adds the chunk's part of both gradients, and returns the gradient of the layer's input.
//
// In a small batch, one kernel forms all gradients. Then sums() returns an undefined tensor, and step 1 is not needed
// if the gradient of the layer's output is known: small_batch_add() takes it instead of g.
class LayerGradients {
 public:
  at::Tensor weight;  // [D, H], or empty if not needed
  at::Tensor bias;    // [D]

  LayerGradients(const LayerCall& call, const Layer& layer, Method method, int64_t N, bool with_weight);

  // Returns a tensor [pieces, D] for the chunk's sums of g, one for every rows_of_sum() rows.
  at::Tensor sums(int64_t first, int64_t rows);

  // The chunk starts at row `first`. Its layer input is h = f(a) [rows, H]. If `with_input` is true, the function
  // returns the gradient of a in a small batch, and the gradient of h in a chunk. Callers ignore any other result.
  at::Tensor add(int64_t first, const at::Tensor& h, Activation f, const at::Tensor& g, bool with_input);

  // The same for a small batch. `grad` is the gradient of the layer's output. The kernel also adds up `terms`.
  at::Tensor small_batch_add(const at::Tensor& h, Activation f, const at::Tensor& grad, const LayerOutput& output,
                             const Terms& terms, bool with_input);

 private:
  const LayerCall& call_;
  const Layer& layer_;
  const Method method_;
  const int64_t N_, rows_of_sum_;
  const bool with_weight_;
  at::Tensor sums_;  // of the chunk, unless they are the gradient itself
};

}  // namespace wakesleep
