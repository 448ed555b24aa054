// A layer of a small batch in one kernel: its GEMM, and what follows the GEMM for each element.
//
// The BLAS divides such a GEMM into tiles designed for many rows, or into partial products, which a second kernel then
// sums. Here, tiles are small, so that there are enough of them to fill the GPU, and the lanes of a warp share the
// reductions of a tile, in a fixed order.
#pragma once

#include "../small_batch.h"
#include "rowwise.cuh"

namespace wakesleep::cuda {

// Loads n consecutive elements starting at an address aligned to n elements.
template <typename compute_t, int n, typename T>
__device__ Packet<compute_t, n> load_packet(const T* from) {
  return load<compute_t>(Span<n, true>{0, 0, n}, from);
}

template <typename T, int n, typename compute_t>
__device__ void store_packet(const Packet<compute_t, n>& values, T* to) {
  store(Span<n, true>{0, 0, n}, values, to);
}

// Sums 32 values over the lanes of a warp. Lane i returns the sum of value i over the warp. `half` is a template
// argument so that the values stay in registers.
template <int half = 16, typename T>
__device__ T sum_by_lane(T (&values)[32]) {
  const bool upper = (threadIdx.x & half) != 0;
#pragma unroll
  for (int i = 0; i < half; ++i) {
    const T kept = upper ? values[i + half] : values[i], given = upper ? values[i] : values[i + half];
    values[i] = kept + __shfl_xor_sync(0xffffffffu, given, half);
  }
  if constexpr (half > 1) {
    return sum_by_lane<half / 2>(values);
  } else {
    return values[0];
  }
}

template <typename scalar_t>
struct LayerOperands {
  const scalar_t* __restrict__ h;       // [N, H]
  const scalar_t* __restrict__ weight;  // [D, H]
  int64_t N, H, D;
};

template <typename scalar_t>
LayerOperands<scalar_t> operands_of(const SmallBatchLayer& layer) {
  return {static_cast<const scalar_t*>(layer.h), static_cast<const scalar_t*>(layer.weight), layer.N, layer.H, layer.D};
}

// A warp computes a tile of 8 rows by 4 columns of h weight^T. The lanes divide the features. After the reduction, each
// lane has one of the 32 elements.
static_assert(kTileRows * kTileColumns == 32);
constexpr int kTileThreads = 64;

// Finds rows number(0), number(1), .. of a matrix [rows, width]. The last row stands in for those beyond it.
template <typename T, int count, typename Number>
__device__ void find_rows(const T* matrix, int64_t rows, int64_t width, const T* (&found)[count],
                          const Number& number) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
    found[i] = matrix + min(number(i), rows - 1) * width;
  }
}

// The columns of a tile. The first is `first` if each tile has consecutive columns, as here.
struct ConsecutiveColumns {
  __device__ int64_t operator()(int64_t first, int c) const { return first + c; }

  // Returns what a lane passes on, given its element of the product.
  template <typename T>
  __device__ T value(T sum) const {
    return sum;
  }
};

// The product has two halves [mu | logvar]. A tile has columns of mu, and then the same columns of logvar. Each lane
// receives the elements of both halves.
struct PairedColumns {
  static constexpr int kPairs = kTileColumns / 2;
  int64_t K;  // the width of a half

  __device__ int64_t operator()(int64_t first, int c) const {
    const int64_t k = first / 2 + c % kPairs;
    return k < K ? c / kPairs * K + k : 2 * K;
  }

  template <typename T>
  __device__ Pair<T> value(T sum) const {
    const T other = __shfl_xor_sync(0xffffffffu, sum, kPairs);
    return (threadIdx.x & kPairs) != 0 ? Pair<T>{other, sum} : Pair<T>{sum, other};
  }
};

// Calls finish(row, column, value of the element) for every element of h weight^T. If this returns a number, the kernel
// also calls finish.put(tile, sum of these numbers). A lane loads n features at a time.
template <int n, typename scalar_t, typename Finish, typename Columns>
__global__ void __launch_bounds__(kTileThreads) layer_kernel(const LayerOperands<scalar_t> layer, const Finish finish,
                                                             const Columns column_of, int64_t columns, int64_t tiles) {
  wait_for_previous();
  using compute_t = Compute<scalar_t>;
  const int lane = threadIdx.x % 32;
  constexpr int warps = kTileThreads / 32;
  for (int64_t tile = int64_t(blockIdx.x) * warps + threadIdx.x / 32; tile < tiles;
       tile += int64_t(gridDim.x) * warps) {
    const int64_t row = tile / columns * kTileRows, column = tile % columns * kTileColumns;
    const scalar_t *h[kTileRows], *weight[kTileColumns];
    find_rows(layer.h, layer.N, layer.H, h, [&](int r) { return row + r; });
    find_rows(layer.weight, layer.D, layer.H, weight, [&](int c) { return column_of(column, c); });
    compute_t sums[kTileRows * kTileColumns] = {};
    Packet<compute_t, n> w[2][kTileColumns], v[2][kTileRows];  // two buffers: current and next operands
    const auto read = [&](int64_t k, int into) {
#pragma unroll
      for (int c = 0; c < kTileColumns; ++c) {
        w[into][c] = load_packet<compute_t, n>(weight[c] + k);
      }
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
        v[into][r] = load_packet<compute_t, n>(h[r] + k);
      }
    };
    const auto multiply = [&](int from) {
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
#pragma unroll
        for (int c = 0; c < kTileColumns; ++c) {
#pragma unroll
          for (int i = 0; i < n; ++i) {
            sums[r * kTileColumns + c] += v[from][r].value[i] * w[from][c].value[i];
          }
        }
      }
    };
    constexpr int step = 32 * n;
    int64_t k = lane * n;
    if (k < layer.H) {
      read(k, 0);
    }
    for (; k < layer.H; k += 2 * step) {
      if (k + step < layer.H) {
        read(k + step, 1);
      }
      multiply(0);
      if (k + 2 * step < layer.H) {
        read(k + 2 * step, 0);
      }
      if (k + step < layer.H) {
        multiply(1);
      }
    }
    const auto value = column_of.value(sum_by_lane(sums));
    const int64_t its_row = row + lane / kTileColumns, its_column = column_of(column, lane % kTileColumns);
    const bool inside = its_row < layer.N && its_column < layer.D;
    if constexpr (std::is_void_v<decltype(finish(its_row, its_column, value))>) {
      if (inside) {
        finish(its_row, its_column, value);
      }
    } else {
      const compute_t total = Team<32>{}.sum(inside ? finish(its_row, its_column, value) : compute_t(0));
      if (lane == 0) {
        finish.put(tile, total);
      }
    }
  }
}

// A matrix whose rows are loaded in packets.
struct PacketRows {
  const void* data;
  int64_t columns;
};

constexpr int kPacketMost = 4;  // larger packets would not fit in the registers

// Calls body(std::integral_constant<int, n>), where n is the number of elements per load. If all rows are aligned, n is
// four, or two for float64; otherwise, n is one.
template <typename scalar_t, typename Body>
void dispatch_packet(std::initializer_list<PacketRows> matrices, const Body& body) {
  constexpr int n = kPacket<scalar_t> < kPacketMost ? kPacket<scalar_t> : kPacketMost;
  bool aligned = true;
  for (const PacketRows& rows : matrices) {
    aligned = aligned && rows.columns % kPacketMost == 0 && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
  }
  aligned ? body(std::integral_constant<int, n>{}) : body(std::integral_constant<int, 1>{});
}

template <typename scalar_t, typename Finish, typename Columns = ConsecutiveColumns>
void launch_layer(Stream stream, const SmallBatchLayer& layer, const Finish& finish, const Columns& column_of = {}) {
  const int64_t columns = (layer.D + kTileColumns - 1) / kTileColumns;
  const int64_t tiles = tiles_of(layer.N, layer.D);
  constexpr int warps = kTileThreads / 32;
  dispatch_packet<scalar_t>({{layer.h, layer.H}, {layer.weight, layer.H}}, [&](auto n) {
    launch(stream, layer_kernel<decltype(n)::value, scalar_t, Finish, Columns>, (tiles + warps - 1) / warps,
           kTileThreads, operands_of<scalar_t>(layer), finish, column_of, columns, tiles);
  });
}

// Returns the draw for one element. It needs only the two words of its half of the Philox block.
template <typename Distribution, typename T>
__device__ T draw_element(const ScheduledKey& key, int64_t element) {
  const int64_t block = uint64_t(element) / kPhiloxWords;
  Words<T> words = draw_words<T>(key, uint32_t(block), uint32_t(block >> 32));
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    words.high.word[w] = element % kPhiloxWords < 2 ? words.high.word[w] : words.high.word[w + 2];
    words.low.word[w] = element % kPhiloxWords < 2 ? words.low.word[w] : words.low.word[w + 2];
  }
  const Draws<T> draws = Distribution::from(words);
  return element % 2 == 0 ? draws.value[0] : draws.value[1];
}

}  // namespace wakesleep::cuda
