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

// A warp computes a tile of the products h weight^T.
constexpr int kTileRows = 8, kTileColumns = 4;

inline int64_t tiles_of(int64_t N, int64_t D) {
  return (N + kTileRows - 1) / kTileRows * ((D + kTileColumns - 1) / kTileColumns);
}

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

// Draws from a Gaussian with parameters [mu | logvar] = h weight^T + bias, where D = 2K.
struct SmallBatchGaussianSample {
  SmallBatchLayer layer;
  const void* bias;    // [D], in the compute type
  const int64_t* key;  // [2]
  void* z;             // [samples, N, K]
  int64_t samples;
};

// The gradient of sum_n w_n log_prob_n for a Bernoulli head, with w_n = scale upstream_n.
struct SmallBatchBernoulliGradient {
  SmallBatchLayer layer;
  const void* bias;  // [D], in the compute type
  Dtype x_dtype;     // uint8 or the compute type
  const void* x;
  const void* upstream;  // in the compute type; null if every element is 1
  double scale;
  RowMap<2> rows;       // operands: x, upstream
  void* grad_products;  // [N, D]
  void* terms;          // [tiles_of(N, D)], in the compute type: the parts of the sum
};

// Values that a kernel adds up besides its own work, in the compute type.
struct Terms {
  const void* value = nullptr;  // [count]
  int64_t count = 0;
  void* total = nullptr;  // []; null if there is nothing to add up
};

// The gradients of a layer y = f_y(h weight^T + bias) whose input is h = f(a). g is the gradient of the products
// h weight^T. If `output` is null, `grad` is g. Otherwise, `grad` is the gradient of y.
struct SmallBatchGradients {
  SmallBatchLayer layer;
  Activation activation;         // f
  Activation output_activation;  // f_y
  const void* grad;              // [N, D]
  const void* output;            // [N, D]: y, or null
  void* grad_weight;             // [D, H]: g^T h, or null
  void* grad_bias;               // [D]: the sum of g over the rows
  void* grad_a;                  // [N, H]: f'(a) g weight, where f'(a) is computed from h; or null
  Terms terms;
};

namespace cuda {
void compute(const SmallBatchProducts& call, Stream stream);
void compute(const SmallBatchOutput& call, Stream stream);
void compute(const SmallBatchSample& call, Stream stream);
void compute(const SmallBatchGaussianSample& call, Stream stream);
void compute(const SmallBatchBernoulliGradient& call, Stream stream);
void compute(const SmallBatchGradients& call, Stream stream);
}  // namespace cuda

}  // namespace wakesleep
