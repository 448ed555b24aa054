// Layers of small batches, computed at once: the GEMM and the operations before and after it.
//
// A GEMM with tens of rows cannot fill a GPU, so the latency of its launch, loads and reductions dominates its time.
// The platform's BLAS leaves the bias, the activation and the sums over rows to separate kernels. Here, a layer needs
// one launch in the forward pass and one in the backward pass.
#pragma once

#include "activations.h"
#include "kernel.h"

namespace wakesleep {

// The operands of a layer, contiguous and of one dtype.
struct SmallBatchLayer {
  Dtype dtype;
  const void *h, *weight;  // [N, H] and [D, H]
  int64_t N, H, D;
};

struct SmallBatchProducts {
  SmallBatchLayer layer;
  void* products;  // [N, D]: h weight^T, in the compute type
};

struct SmallBatchOutput {
  SmallBatchLayer layer;
  Activation activation;
  const void* bias;  // [D], in the compute type
  void* output;      // [N, D]: f(h weight^T + bias)
};

struct SmallBatchSample {
  SmallBatchLayer layer;
  const void* bias;    // [D], in the compute type
  const int64_t* key;  // [2]
  Dtype x_dtype;       // uint8 or the layer's
  void* x;             // [N, D]: draws with logits h weight^T + bias
};

// The gradients of a layer whose input is h = f(a). g is the gradient of the products h weight^T.
struct SmallBatchGradients {
  SmallBatchLayer layer;
  Activation activation;  // f
  const void* grad;       // [N, D]: g
  void* grad_weight;      // [D, H]: g^T h, or null
  void* grad_bias;        // [D]: the sum of g over the rows
  void* grad_a;           // [N, H]: f'(a) g weight, where f'(a) is computed from h; or null
};

namespace cuda {
void compute(const SmallBatchProducts& call, Stream stream);
void compute(const SmallBatchOutput& call, Stream stream);
void compute(const SmallBatchSample& call, Stream stream);
void compute(const SmallBatchGradients& call, Stream stream);
}  // namespace cuda

}  // namespace wakesleep
