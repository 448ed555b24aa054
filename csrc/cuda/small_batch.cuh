// Layers for small batches. One kernel computes the GEMM and the operations before and after it.
//
// A GEMM with tens of rows cannot fill a GPU, so the latency of its launch, loads and reductions dominates its time.
// cuBLAS divides the GEMM into tiles designed for many rows, or into partial products, which a second kernel then sums.
// cuBLAS leaves the bias, the activation and the sums over rows to separate kernels. Here, a layer needs one launch in
// the forward pass and one in the backward pass. Tiles are small, so that there are enough of them to fill the GPU. The
// lanes or warps share the reductions of a tile, in a fixed order.
#pragma once

#include "../linear.h"
#include "column_sums.cuh"

namespace wakesleep::cuda {

// The limit of 256 rows was measured on an H200.
inline int64_t small_batch_limit() { return wakesleep::small_batch_limit(256); }

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

// ---- forward ------------------------------------------------------------------------------------------------------

// A warp computes 8 rows by 4 columns of h weight^T. The lanes divide the features. After the reduction, each lane has
// one of the 32 elements.
constexpr int kTileRows = 8, kTileColumns = 4, kTileThreads = 64;

inline int64_t column_tiles(int64_t D) { return (D + kTileColumns - 1) / kTileColumns; }

// Calls finish(row, column, element of the product) for every element of h weight^T. A lane loads n features at a time.
template <int n, typename scalar_t, typename Finish>
__global__ void __launch_bounds__(kTileThreads)
    layer_kernel(const LayerOperands<scalar_t> layer, const Finish finish, int64_t columns, int64_t tiles) {
  using compute_t = at::opmath_type<scalar_t>;
  const int lane = threadIdx.x % 32;
  constexpr int warps = kTileThreads / 32;
  for (int64_t tile = int64_t(blockIdx.x) * warps + threadIdx.x / 32; tile < tiles;
       tile += int64_t(gridDim.x) * warps) {
    const int64_t row = tile / columns * kTileRows, column = tile % columns * kTileColumns;
    const scalar_t *h[kTileRows], *weight[kTileColumns];
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      h[r] = layer.h + min(row + r, layer.N - 1) * layer.H;
    }
#pragma unroll
    for (int c = 0; c < kTileColumns; ++c) {
      weight[c] = layer.weight + min(column + c, layer.D - 1) * layer.H;
    }
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
    const compute_t sum = sum_by_lane(sums);
    const int64_t its_row = row + lane / kTileColumns, its_column = column + lane % kTileColumns;
    if (its_row < layer.N && its_column < layer.D) {
      finish(its_row, its_column, sum);
    }
  }
}

// ---- backward -----------------------------------------------------------------------------------------------------

constexpr int kColumnsAtOnce = 4;  // columns of g that one load reads

// The partial sums that each warp of a block computed, in shared memory. total(i, lane) sums value i of this lane over
// the warps.
template <typename T, int count>
struct SumsOfWarps {
  T (&of)[kWarps][count][32];

  __device__ void put(int i, T value) const { of[threadIdx.x / 32][i][threadIdx.x % 32] = value; }

  __device__ T total(int i, int lane) const {
    T sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      sum += of[warp][i][lane];
    }
    return sum;
  }
};

// Computes the gradients of a layer. Its input is h = f(a), and g is the gradient of the products h weight^T:
//
//   weight: g^T h;
//   bias: the sum of g over the rows;
//   a: f'(a) g weight, where f'(a) is computed from h.
//
// The first blocks compute the gradients of weight and bias: a lane processes 4 columns of g and n features, and the
// warps divide the rows. The other blocks compute the gradient of a: a lane processes 4 rows of one feature, and the
// warps divide the columns of g.
template <int n, typename scalar_t, typename F>
struct LayerGradientsOf : LayerOperands<scalar_t> {
  using compute_t = at::opmath_type<scalar_t>;
  using Columns = Packet<compute_t, kColumnsAtOnce>;
  static constexpr int kRowsOfH = 4;
  static constexpr int kAhead = kPacket<compute_t>;  // terms of a sum that are loaded together
  static constexpr int kSums = kColumnsAtOnce * (n + 1);
  static_assert(kSums >= kRowsOfH);
  using Sums = SumsOfWarps<compute_t, kSums>;

  const scalar_t* __restrict__ grad;   // [N, D], gradient of the products
  scalar_t* __restrict__ grad_weight;  // [D, H], or null
  scalar_t* __restrict__ grad_bias;    // [D]
  scalar_t* __restrict__ grad_h;       // [N, H], or null
  F activation;

  // Returns the number of packets in a row of h. It is at least one, so that a thread writes the bias gradient even if
  // H is 0.
  __host__ __device__ int64_t packets() const { return this->H == 0 ? 1 : (this->H + n - 1) / n; }
  int64_t blocks_of_weight() const {
    const int64_t tiles = (this->D + kColumnsAtOnce - 1) / kColumnsAtOnce * packets();
    return (tiles + 31) / 32;
  }
  int64_t blocks_of_h() const {
    return grad_h == nullptr ? 0 : (this->N + kRowsOfH - 1) / kRowsOfH * ((this->H + 31) / 32);
  }

  // Returns columns column .. column + 3 of a row of g, with zeros for columns beyond D.
  __device__ Columns columns_of(int64_t row, int64_t column) const {
    const scalar_t* from = grad + row * this->D + column;
    if constexpr (n > 1) {
      return load_packet<compute_t, kColumnsAtOnce>(from);
    } else {
      Columns columns;
#pragma unroll
      for (int c = 0; c < kColumnsAtOnce; ++c) {
        columns.value[c] = column + c < this->D ? static_cast<compute_t>(from[c]) : compute_t(0);
      }
      return columns;
    }
  }

  __device__ void write_weight(int64_t block, Sums sums) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t place = block * 32 + lane, column = place / packets() * kColumnsAtOnce, k = place % packets() * n;
    Packet<compute_t, n> products[kColumnsAtOnce] = {};
    Columns bias = {};
    if (column < this->D) {
      for (int64_t first = warp; first < this->N; first += kAhead * kWarps) {
        Columns g[kAhead];
        Packet<compute_t, n> v[kAhead];
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          const int64_t row = first + a * kWarps;
          g[a] = {};
          v[a] = {};
          if (row < this->N) {
            g[a] = columns_of(row, column);
          }
          if (row < this->N && k < this->H) {
            v[a] = load_packet<compute_t, n>(this->h + row * this->H + k);
          }
        }
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
#pragma unroll
          for (int c = 0; c < kColumnsAtOnce; ++c) {
            bias.value[c] += g[a].value[c];
#pragma unroll
            for (int i = 0; i < n; ++i) {
              products[c].value[i] += g[a].value[c] * v[a].value[i];
            }
          }
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kColumnsAtOnce; ++c) {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        sums.put(c * n + i, products[c].value[i]);
      }
      sums.put(kColumnsAtOnce * n + c, bias.value[c]);
    }
    __syncthreads();
    const int64_t d = column + warp;  // each warp writes one column
    if (warp >= kColumnsAtOnce || d >= this->D) {
      return;
    }
    if (grad_weight != nullptr && k < this->H) {
      Packet<compute_t, n> total;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        total.value[i] = sums.total(warp * n + i, lane);
      }
      store_packet(total, grad_weight + d * this->H + k);
    }
    if (k == 0) {
      grad_bias[d] = static_cast<scalar_t>(sums.total(kColumnsAtOnce * n + warp, lane));
    }
  }

  __device__ void write_h(int64_t block, Sums sums) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t across = (this->H + 31) / 32, k = block % across * 32 + lane, first = block / across * kRowsOfH;
    const bool inside = k < this->H;
    const int64_t feature = inside ? k : 0;
    compute_t products[kRowsOfH] = {};
    constexpr int step = kWarps * kColumnsAtOnce;
    // There are no branches between the loads, so all of them are in flight together. A load that would be out of range
    // reads another element, whose value is not used.
    for (int64_t start = warp * kColumnsAtOnce; start < this->D; start += kAhead * step) {
      Columns w[kAhead], g[kAhead][kRowsOfH];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int64_t column = start + a * step < this->D ? start + a * step : 0;
#pragma unroll
        for (int c = 0; c < kColumnsAtOnce; ++c) {
          const int64_t d = n > 1 ? column + c : min(column + c, this->D - 1);
          w[a].value[c] = static_cast<compute_t>(__ldg(this->weight + d * this->H + feature));
        }
#pragma unroll
        for (int r = 0; r < kRowsOfH; ++r) {
          g[a][r] = columns_of(min(first + r, this->N - 1), column);
        }
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (start + a * step < this->D) {
#pragma unroll
          for (int r = 0; r < kRowsOfH; ++r) {
#pragma unroll
            for (int c = 0; c < kColumnsAtOnce; ++c) {
              products[r] += g[a][r].value[c] * w[a].value[c];
            }
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsOfH; ++r) {
      sums.put(r, products[r]);
    }
    __syncthreads();
    const int64_t row = first + warp;  // each warp writes one row
    if (warp < kRowsOfH && row < this->N && inside) {
      const int64_t place = row * this->H + k;
      const auto y = static_cast<compute_t>(this->h[place]);
      grad_h[place] = static_cast<scalar_t>(activation.gradient(sums.total(warp, lane), y));
    }
  }
};

template <typename Gradients>
__global__ void __launch_bounds__(kBlockThreads)
    layer_gradients_kernel(const Gradients gradients, int64_t blocks_of_weight, int64_t blocks) {
  __shared__ typename Gradients::compute_t shared[kWarps][Gradients::kSums][32];
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    if (block < blocks_of_weight) {
      gradients.write_weight(block, {shared});
    } else {
      gradients.write_h(block - blocks_of_weight, {shared});
    }
    __syncthreads();  // before the next block's sums overwrite the ones in `shared`
  }
}

// ---- host code ----------------------------------------------------------------------------------------------------

// The operands of a layer, made contiguous and converted to one dtype for the kernels.
struct FewRows {
  at::Tensor h;       // [N, H]
  at::Tensor weight;  // [D, H]

  FewRows(const at::Tensor& h_in, const at::Tensor& weight_in, at::ScalarType type)
      : h(h_in.to(type).contiguous()), weight(weight_in.to(type).contiguous()) {}

  template <typename scalar_t>
  LayerOperands<scalar_t> operands() const {
    return {h.const_data_ptr<scalar_t>(), weight.const_data_ptr<scalar_t>(), h.size(0), h.size(1), weight.size(0)};
  }
};

// Calls body(std::integral_constant<int, n>), where n is the number of elements per load. If all rows are aligned, n is
// four, or two for float64; otherwise, n is one. Larger loads would not fit in the registers.
template <typename scalar_t, typename Body>
void dispatch_packet(std::initializer_list<at::Tensor> tensors, const Body& body) {
  constexpr int n = kPacket<scalar_t> < kColumnsAtOnce ? kPacket<scalar_t> : kColumnsAtOnce;
  constexpr int multiple = kColumnsAtOnce;  // columns of grad are always loaded in packets of this size
  bool aligned = true;
  for (const at::Tensor& tensor : tensors) {
    aligned =
        aligned && tensor.size(-1) % multiple == 0 && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  }
  aligned ? body(std::integral_constant<int, n>{}) : body(std::integral_constant<int, 1>{});
}

template <typename scalar_t, typename Finish>
void launch_layer(const FewRows& layer, const Finish& finish) {
  const auto operands = layer.operands<scalar_t>();
  const int64_t columns = column_tiles(operands.D), tiles = (operands.N + kTileRows - 1) / kTileRows * columns;
  constexpr int warps = kTileThreads / 32;
  dispatch_packet<scalar_t>({layer.h, layer.weight}, [&](auto n) {
    launch(layer_kernel<decltype(n)::value, scalar_t, Finish>, (tiles + warps - 1) / warps, kTileThreads, operands,
           finish, columns, tiles);
  });
}

template <typename scalar_t, typename F>
void launch_layer_gradients(const FewRows& layer, const at::Tensor& grad, const at::Tensor& grad_weight,
                            const at::Tensor& grad_bias, const at::Tensor& grad_h, F activation) {
  const auto pointer = [](const at::Tensor& tensor) {
    return tensor.numel() > 0 ? tensor.mutable_data_ptr<scalar_t>() : nullptr;
  };
  dispatch_packet<scalar_t>({layer.h, layer.weight, grad}, [&](auto n) {
    using Gradients = LayerGradientsOf<decltype(n)::value, scalar_t, F>;
    Gradients gradients = {layer.operands<scalar_t>(),
                           grad.const_data_ptr<scalar_t>(),
                           pointer(grad_weight),
                           pointer(grad_bias),
                           pointer(grad_h),
                           activation};
    const int64_t of_weight = gradients.blocks_of_weight(), blocks = of_weight + gradients.blocks_of_h();
    launch(layer_gradients_kernel<Gradients>, blocks, kBlockThreads, gradients, of_weight, blocks);
  });
}

}  // namespace wakesleep::cuda
