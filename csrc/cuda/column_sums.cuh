// Processes rows and sums them over the batch in the same kernel.
//
// A block processes a piece of the rows and all columns, tile by tile. Its warps divide the rows, and their lanes the
// columns. It adds up its warps' sums in shared memory, in order. The caller adds up the pieces.
#pragma once

#include "rowwise.cuh"

namespace wakesleep::cuda {

constexpr int kWarps = kBlockThreads / 32;

// Rows of a warp; in float64, more would not fit in the registers.
template <typename compute_t>
constexpr int kRowsOfWarp = 16 / sizeof(compute_t);

template <typename compute_t>
constexpr int kPieceOfSum = kWarps * kRowsOfWarp<compute_t>;

inline int64_t rows_of_sum(at::ScalarType compute) {
  return compute == at::kDouble ? kPieceOfSum<double> : kPieceOfSum<float>;
}

// The sums of each warp of a block for every column of a tile.
template <typename compute_t, int n>
struct TileOfWarps {
  compute_t (&of)[kWarps][32 * n];

  // Writes the total over the warps to sums[c] for every column c < `columns`. `own` is the lane's part.
  __device__ void add_up(const Packet<compute_t, n>& own, int64_t columns, compute_t* sums) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncthreads();  // others may still read the previous tile
#pragma unroll
    for (int i = 0; i < n; ++i) {
      of[warp][lane * n + i] = own.value[i];
    }
    __syncthreads();
    const int column = threadIdx.x;
    if (column < 32 * n && column < columns) {
      compute_t sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        sum += of[w][column];
      }
      sums[column] = sum;
    }
  }
};

// Computes the sums over every piece of rows, [pieces, D]. `rows` has
//
//   kSpan: the columns that a lane processes at once;
//   begin(first row, held): returns the state of the warp's rows, of which `held` exist; another row may replace a
//     missing one;
//   read(kept, r, span): returns the inputs of the warp's row r in the span;
//   make(kept, r, span, inputs): writes the outputs and returns the values to be summed;
//   end(kept): runs after the last column.
//
// A warp reads all its rows before it makes the first. Otherwise each read would wait for the write before it, since
// the compiler has to assume that the two may overlap.
template <typename compute_t, typename Rows>
__global__ void __launch_bounds__(kBlockThreads, 2)
    summed_rows_kernel(const Rows rows, compute_t* sums, int64_t count, int64_t D, int64_t pieces) {
  constexpr int n = Rows::kSpan;
  static_assert(32 * n <= kBlockThreads);
  __shared__ compute_t shared[kWarps][32 * n];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
    const int64_t first = piece * kPieceOfSum<compute_t> + warp * kRowsOfWarp<compute_t>, rest = count - first;
    const int held = rest <= 0 ? 0 : static_cast<int>(min(int64_t(kRowsOfWarp<compute_t>), rest));
    auto kept = rows.begin(min(first, count - 1), held);
    for (int64_t tile = 0; tile < D; tile += 32 * n) {
      const int64_t column = tile + lane * n;
      Packet<compute_t, n> total = {};
      if (held > 0 && column < D) {
        const Span<n, false> span = {column, 0, static_cast<int>(min(int64_t(n), D - column))};
        decltype(rows.read(kept, 0, span)) read[kRowsOfWarp<compute_t>];
#pragma unroll
        for (int r = 0; r < kRowsOfWarp<compute_t>; ++r) {
          read[r] = rows.read(kept, r, span);
        }
#pragma unroll
        for (int r = 0; r < kRowsOfWarp<compute_t>; ++r) {
          if (r < held) {
            const auto made = rows.make(kept, r, span, read[r]);
#pragma unroll
            for (int i = 0; i < n; ++i) {
              total.value[i] += made.value[i];
            }
          }
        }
      }
      TileOfWarps<compute_t, n>{shared}.add_up(total, D - tile, sums + piece * D + tile);
    }
    rows.end(kept);
  }
}

template <typename compute_t, typename Rows>
void launch_summed_rows(const Rows& rows, compute_t* sums, int64_t count, int64_t D) {
  const int64_t pieces = (count + kPieceOfSum<compute_t> - 1) / kPieceOfSum<compute_t>;
  launch(summed_rows_kernel<compute_t, Rows>, pieces, kBlockThreads, rows, sums, count, D, pieces);
}

}  // namespace wakesleep::cuda
