// Processes rows and sums the results over the rows in the same kernel.
//
// A block processes a piece of the rows. It covers all columns, one tile after the other. Its warps divide the rows of
// the piece, and the lanes of a warp divide the columns of the tile. The block adds the sums of its warps in shared
// memory, in a fixed order. The caller adds the sums of the pieces.
#pragma once

#include "rowwise.cuh"

namespace wakesleep::cuda {

constexpr int kWarps = kBlockThreads / 32;

// The number of rows per warp. With more rows, a step at common sizes would have too few blocks for a GPU: at 5,000
// rows, some multiprocessors had twice as many as others.
template <typename compute_t>
constexpr int kRowsOfWarp = 8 / sizeof(compute_t);

template <typename compute_t>
constexpr int kPieceOfSum = kWarps * kRowsOfWarp<compute_t>;

inline int64_t rows_of_sum(Dtype compute) {
  return compute == Dtype::float64 ? kPieceOfSum<double> : kPieceOfSum<float>;
}

// The partial sums of each warp in a block, for every column of a tile.
template <typename compute_t, int n>
struct TileOfWarps {
  compute_t (&of)[kWarps][32 * n];

  // Writes the sum over the warps to sums[c] for every column c < `columns`. `own` holds the partial sums of the
  // calling lane.
  __device__ void add_up(const Packet<compute_t, n>& own, int64_t columns, compute_t* sums) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncthreads();  // other threads may still read the previous tile
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

// Processes every row, and writes the sum of every piece of rows to `sums` [pieces, D]. `rows` is a row kernel's
// functor whose work is divided into four members:
//
//   begin(row): returns the state of a row, a Rows::Row;
//   read(state, span): returns the inputs in a span of rows.kSpan columns, a Rows::Read;
//   make(state, span, inputs): writes the outputs in the span and returns the values to be summed;
//   end(team, state): is called after the last column.
//
// A warp reads all its rows before it makes the first one. Otherwise each load would wait for the store before it,
// because the compiler must assume that the two may alias. Past the last row, a warp reads that row again.
template <typename compute_t, typename Rows>
__global__ void __launch_bounds__(kBlockThreads, 2)
    summed_rows_kernel(const Rows rows, compute_t* sums, int64_t count, int64_t D, int64_t pieces) {
  wait_for_previous();
  constexpr int n = Rows::kSpan, kRows = kRowsOfWarp<compute_t>;
  static_assert(32 * n <= kBlockThreads);
  __shared__ compute_t shared[kWarps][32 * n];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
    const int64_t first = piece * kPieceOfSum<compute_t> + warp * kRows;
    typename Rows::Row state[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      state[r] = rows.begin(min(first + r, count - 1));
    }
    for (int64_t tile = 0; tile < D; tile += 32 * n) {
      const int64_t column = tile + lane * n;
      Packet<compute_t, n> total = {};
      if (first < count && column < D) {
        const Span<n, false> span = {column, 0, static_cast<int>(min(int64_t(n), D - column))};
        typename Rows::Read read[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          read[r] = rows.read(state[r], span);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (first + r < count) {
            const auto made = rows.make(state[r], span, read[r]);
#pragma unroll
            for (int i = 0; i < n; ++i) {
              total.value[i] += made.value[i];
            }
          }
        }
      }
      TileOfWarps<compute_t, n>{shared}.add_up(total, D - tile, sums + piece * D + tile);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r < count) {
        rows.end(Team<32>{}, state[r]);
      }
    }
  }
}

template <typename compute_t, typename Rows>
void launch_summed_rows(Stream stream, const Rows& rows, compute_t* sums, int64_t count, int64_t D) {
  const int64_t pieces = (count + kPieceOfSum<compute_t> - 1) / kPieceOfSum<compute_t>;
  launch(stream, summed_rows_kernel<compute_t, Rows>, pieces, kBlockThreads, rows, sums, count, D, pieces);
}

}  // namespace wakesleep::cuda
