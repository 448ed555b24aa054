// GEMMs of layers, and the choice of how to compute them.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <string_view>

#include "../backend.h"
#include "../kernels/cpu/threads.h"

namespace wakesleep {

// Returns tensor.to(type), but does not call to() if the tensor already has this type. The call would take half a
// microsecond.
inline at::Tensor in_type(const at::Tensor& tensor, at::ScalarType type) {
  return tensor.scalar_type() == type ? tensor : tensor.to(type);
}

enum class Method {
  small_batch,  // kernels that compute a whole layer at once
  skinny_gemm,  // our GEMM without packing
  packed_gemm,  // our GEMM with packing
  onednn,
  blas,  // MKL or cuBLAS
};

// What the choice depends on: the product a b of matrices [M, K] and [K, N].
struct Gemm {
  at::Device device;
  at::ScalarType a_dtype, b_dtype;
  int64_t M, K, N;
  int64_t a_row, a_column, b_row, b_column;  // strides
  bool is_layer;                             // whether the caller can have a whole layer computed at once

  static Gemm of(const at::Tensor& a, const at::Tensor& b) {
    return {a.device(),  a.scalar_type(), b.scalar_type(), a.size(0),   a.size(1), b.size(1),
            a.stride(0), a.stride(1),     b.stride(0),     b.stride(1), false};
  }

  // The products h weight^T of a layer.
  static Gemm of_layer(const at::Tensor& h, const at::Tensor& weight) {
    return {h.device(),  h.scalar_type(), weight.scalar_type(), h.size(0),        h.size(1), weight.size(0),
            h.stride(0), h.stride(1),     weight.stride(1),     weight.stride(0), true};
  }
};

// Decides how to compute a GEMM, or a whole layer.
//
// small_batch: a layer with at most as many rows as measured for the backend, if the backend has kernels for it. Such a
//   GEMM cannot fill a GPU, so launches and reductions dominate, and one kernel for everything is fastest.
// skinny_gemm: few rows, and matrices that need no packing. The rows are those of the result or, if the product is the
//   gradient of a weight, those that are summed. Forward, adding up the lanes takes about 5 cycles per element of the
//   result [M, N], and packing takes about 0.3 cycles per element of b [K, N]. So packing pays off from M = K / 16 rows
//   on. We measured this on a Xeon, where MKL and packed_gemm pack. Backward, packing pays off from 13 rows on with
//   AVX-512 (Xeon), and from 25 rows on with AVX2 (Zen 3).
// packed_gemm: float32 on a processor with AVX2. On a Zen 3, it is 0.95 to 1.08 times as fast as MKL, which is 1.3 to 3
//   times as fast as oneDNN. It applies bias and activation itself, so a training step with batch size 100 takes 0.95
//   times as long as with MKL. On a Xeon with AVX-512, it takes as long as with MKL.
// onednn: layers in bfloat16 on a CPU, and float32 on a processor whose AVX-512 MKL does not use, because its vendor is
//   not Intel. There, oneDNN is twice as fast as MKL. Elsewhere, MKL is faster. Below 2^20 multiplications, setting up
//   the call costs more than it saves.
// blas: everything else.
Method method_for(const Gemm& gemm);

// Returns the dtype of the factors in which layers of dtype `dtype` multiply. A GPU multiplies in this dtype. So does a
// CPU that multiplies bfloat16 numbers, except in small layers. Otherwise, a CPU converts 16-bit factors to float32.
at::ScalarType operand_dtype(at::Device device, at::ScalarType dtype, int64_t multiplications);

// Returns the matrix product a b in dtype `type`, rounded once. A CPU converts 16-bit factors to float32 unless `type`
// is theirs.
at::Tensor product(const at::Tensor& a, const at::Tensor& b, at::ScalarType type);

// The same, but a CPU rounds the product to the dtype of the factors first.
at::Tensor fast_product(const at::Tensor& a, const at::Tensor& b, at::ScalarType type);

// Adds the matrix product a b, as fast_product() computes it, to `sum` in place.
void add_product(const at::Tensor& sum, const at::Tensor& a, const at::Tensor& b);

// Returns true if layer_output() computes a layer y = f(h weight^T + bias) by this method.
bool has_layer_output(Method method, Activation f);

// Returns y [N, D], in the dtype of h and weight. If `place` is defined, y is written to it.
at::Tensor layer_output(Method method, const Gemm& gemm, Activation f, const at::Tensor& h, const at::Tensor& weight,
                        const at::Tensor& bias, at::Tensor place);

}  // namespace wakesleep
