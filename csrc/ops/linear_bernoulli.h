// The checked operands that the Bernoulli heads share. Their logits are the output of a linear layer. If the logits are
// not kept, they are computed in chunks small enough to stay in cache.
#pragma once

#include "bernoulli.h"
#include "layers.h"

namespace wakesleep {

// A call with one layer.
struct Head : LayerCall, Layer {
  Head(const char* op_in, const at::Tensor& h, const at::Tensor& weight_in, const at::Tensor& bias_in)
      : LayerCall(op_in, h, weight_in, bias_in), Layer(layer(weight_in, bias_in)) {}

  Method method(const at::Tensor& h) const { return method_for(Gemm::of_layer(h, weight)); }

  // Calls body(first row, rows of h [rows, H], product of these rows and weight^T [rows, D]) for every chunk of h.
  // There is only one chunk if the batch is small or if `at_once` is true. A caller that keeps the product sets
  // `at_once`.
  template <typename Body>
  void for_products(const at::Tensor& h, bool at_once, const Body& body) const {
    if (method(h) == Method::small_batch) {
      const SmallBatch small(h, *this, dtype);
      const at::Tensor products = at::empty({h.size(0), D}, h.options().dtype(compute));
      small.compute(SmallBatchProducts{small.layer(), write(products)});
      return body(0, h, products);
    }
    for_chunks(h, at_once ? h.size(0) : chunk_rows(D), [&](int64_t first, const at::Tensor& h_rows) {
      body(first, h_rows, product(h_rows, weight.t(), compute));
    });
  }
};

}  // namespace wakesleep
