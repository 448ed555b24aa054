// A block sums a few columns, so that even a narrow matrix fills the GPU. Its threads divide the rows, and the sums of
// the threads are added in a fixed order.
#include "../column_sums.h"

#include "column_sums.cuh"

namespace wakesleep::cuda {
namespace {

constexpr int kColumns = 8;  // 32 bytes in float32, the least that memory transfers

template <typename compute_t>
__global__ void __launch_bounds__(kBlockThreads)
    column_sums_kernel(const compute_t* __restrict__ rows, compute_t* sums, int64_t count, int64_t D, bool adds) {
  wait_for_previous();
  __shared__ compute_t partial[kWarps][kColumns];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t first = int64_t(blockIdx.x) * kColumns; first < D; first += int64_t(gridDim.x) * kColumns) {
    const int64_t column = first + lane % kColumns;
    compute_t sum = 0;
    if (column < D) {
#pragma unroll 4
      for (int64_t row = threadIdx.x / kColumns; row < count; row += kBlockThreads / kColumns) {
        sum += rows[row * D + column];
      }
    }
#pragma unroll
    for (int distance = kColumns; distance < 32; distance *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    }
    __syncthreads();  // other threads may still read the previous columns
    if (lane < kColumns) {
      partial[warp][lane] = sum;
    }
    __syncthreads();
    if (warp == 0 && lane < kColumns && column < D) {
      compute_t total = adds ? sums[column] : compute_t(0);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        total += partial[w][lane];
      }
      sums[column] = total;
    }
  }
}

}  // namespace

void compute(const ColumnSums& call, Stream stream) {
  const auto sum = [&](auto zero) {
    using compute_t = decltype(zero);
    launch(stream, column_sums_kernel<compute_t>, (call.D + kColumns - 1) / kColumns, kBlockThreads,
           static_cast<const compute_t*>(call.rows), static_cast<compute_t*>(call.sums), call.count, call.D, call.adds);
  };
  call.dtype == Dtype::float64 ? sum(0.0) : sum(0.0f);
}

}  // namespace wakesleep::cuda
