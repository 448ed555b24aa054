// Rows whose sum is wanted beside what else is made of them.
//
// A block takes a piece of the rows and all columns, tile by tile. Its warps divide the rows, its lanes the columns;
// what the warps have summed is added up in shared memory, in their order. The pieces' sums are left to be added up.
#pragma once

#include "rowwise.cuh"

namespace wakesleep::cuda {

constexpr int kWarps = kBlockThreads / 32;

// Rows that a warp takes: in float64, more would not fit in the registers.
template <typename compute_t>
constexpr int kRowsOfWarp = 16 / sizeof(compute_t);

template <typename compute_t>
constexpr int kPieceOfSum = kWarps * kRowsOfWarp<compute_t>;

inline int64_t rows_of_sum(at::ScalarType compute) {
  return compute == at::kDouble ? kPieceOfSum<double> : kPieceOfSum<float>;
}

// What the warps of a block have for each column of a tile.
template <typename compute_t, int n>
struct TileOfWarps {
  compute_t (&of)[kWarps][32 * n];

  // sums[c] = the total over the warps for every column c of the tile that there is; `own` is a lane's part.
  __device__ void add_up(const Packet<compute_t, n>& own, int64_t columns, compute_t* sums) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncthreads();  // those of the tile before may still be read
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

// The sums over every piece of rows, [pieces, D], where `rows` has
//
//   kSpan, the columns that a lane takes at once;
//   begin(first row, how many of the warp's rows there are): what the warp keeps of them; of those that are missing,
//     another may be kept instead;
//   read(kept, r, span): what the span of the warp's row r is made from;
//   make(kept, r, span, what was read): does what is to be done, and returns what is to be summed;
//   end(kept): after the last columns.
//
// All of a warp's rows are read before the first is made. What one writes might, for all the compiler knows, be what
// the next reads, and would be waited for.
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
