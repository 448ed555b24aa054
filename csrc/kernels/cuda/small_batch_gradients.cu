#include "column_sums.cuh"
#include "small_batch.cuh"

namespace wakesleep::cuda {
namespace {

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

// Computes the gradients of a layer. Its input is h = f(a), and g is the gradient of the products h weight^T. The grid
// has two kinds of blocks. In both, a lane keeps the sums of its own elements, each warp adds every 8th term of these
// sums, and the sums of the warps meet in shared memory.
//
// Blocks of the weight: grad_weight = g^T h, and grad_bias, the sum of g over the rows.
//
//                 H features                 Each sum has N terms, one for each row of the batch:
//            lane 0   lane 1   ...           warp 0 adds rows 0, 8, 16, ...
//          +--------+--------+----           warp 1 adds rows 1, 9, 17, ...
//     D    | 4 x n  | 4 x n  |
//  columns +--------+--------+----           A lane has 4 columns of g and n features of h. The lane of feature 0 also
//   of g   | 4 x n  | 4 x n  |               sums its 4 columns of g alone.
//
// Blocks of h: grad_a = f'(a) g weight, where f'(a) is computed from h.
//
//                 H features                 Each sum has D terms, one for each column of g:
//            lane 0   lane 1   ... lane 31   warp 0 adds columns 0 to 3, 32 to 35, ...
//          +--------+--------+----           warp 1 adds columns 4 to 7, 36 to 39, ...
//  N rows  | 4 x 1  | 4 x 1  |
//
// If `of_output` is true, g is f_y'(y) times the gradient of the layer's output y, and is computed from both.
template <int n, typename scalar_t, typename F, bool of_output>
struct LayerGradientsOf : LayerOperands<scalar_t> {
  using compute_t = Compute<scalar_t>;
  using Columns = Packet<compute_t, kColumnsAtOnce>;
  static constexpr int kRowsOfH = 4;
  static constexpr int kAhead = of_output ? 2 : kPacket<compute_t>;  // terms of a sum that are loaded together
  static constexpr int kSums = kColumnsAtOnce * (n + 1);
  static_assert(kSums >= kRowsOfH);
  using Sums = SumsOfWarps<compute_t, kSums>;

  const scalar_t* __restrict__ grad;    // [N, D]: g, or the gradient of y
  const scalar_t* __restrict__ output;  // [N, D]: y, if of_output is true
  Activation output_activation;
  scalar_t* __restrict__ grad_weight;  // [D, H], or null
  scalar_t* __restrict__ grad_bias;    // [D]
  scalar_t* __restrict__ grad_h;       // [N, H], or null
  F activation;
  const compute_t* __restrict__ terms;  // [count]
  int64_t count;
  compute_t* __restrict__ total;  // null if there are no terms to add up

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

  // Returns columns column .. column + 3 of a row of a matrix [N, D], with zeros for columns beyond D.
  __device__ Columns columns_in(const scalar_t* matrix, int64_t row, int64_t column) const {
    const scalar_t* from = matrix + row * this->D + column;
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

  // What g is computed from. It is loaded first and computed later, because a branch would delay the next load.
  struct Loaded {
    Columns grad, output;
  };

  __device__ Loaded load_columns(int64_t row, int64_t column) const {
    return {columns_in(grad, row, column), of_output ? columns_in(output, row, column) : Columns{}};
  }

  __device__ Columns gradient_of(const Loaded& loaded) const {
    Columns g = loaded.grad;
    if constexpr (of_output) {
#pragma unroll
      for (int c = 0; c < kColumnsAtOnce; ++c) {
        g.value[c] = activation_gradient(output_activation, g.value[c], loaded.output.value[c]);
      }
    }
    return g;
  }

  // Adds the terms of the calling warp to the sums of 4 columns of g and n features of h.
  __device__ void add_rows(int64_t column, int64_t k, Packet<compute_t, n> (&products)[kColumnsAtOnce],
                           Columns& bias) const {
    for (int64_t first = threadIdx.x / 32; first < this->N; first += kAhead * kWarps) {
      Loaded loaded[kAhead];
      Packet<compute_t, n> v[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int64_t row = first + a * kWarps;
        loaded[a] = {};
        v[a] = {};
        if (row < this->N) {
          loaded[a] = load_columns(row, column);
        }
        if (row < this->N && k < this->H) {
          v[a] = load_packet<compute_t, n>(this->h + row * this->H + k);
        }
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const Columns g = gradient_of(loaded[a]);
#pragma unroll
        for (int c = 0; c < kColumnsAtOnce; ++c) {
          bias.value[c] += g.value[c];
#pragma unroll
          for (int i = 0; i < n; ++i) {
            products[c].value[i] += g.value[c] * v[a].value[i];
          }
        }
      }
    }
  }

  __device__ void write_weight(int64_t block, Sums sums) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t place = block * 32 + lane, column = place / packets() * kColumnsAtOnce, k = place % packets() * n;
    Packet<compute_t, n> products[kColumnsAtOnce] = {};
    Columns bias = {};
    if (column < this->D) {
      add_rows(column, k, products, bias);
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
      Columns w[kAhead];
      Loaded loaded[kAhead][kRowsOfH];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int64_t column = start + a * step < this->D ? start + a * step : 0;
#pragma unroll
        for (int c = 0; c < kColumnsAtOnce; ++c) {
          const int64_t d = n > 1 ? column + c : min(column + c, this->D - 1);
          w[a].value[c] = load_packet<compute_t, 1>(this->weight + d * this->H + feature).value[0];
        }
#pragma unroll
        for (int r = 0; r < kRowsOfH; ++r) {
          loaded[a][r] = load_columns(min(first + r, this->N - 1), column);
        }
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (start + a * step < this->D) {
#pragma unroll
          for (int r = 0; r < kRowsOfH; ++r) {
            const Columns g = gradient_of(loaded[a][r]);
#pragma unroll
            for (int c = 0; c < kColumnsAtOnce; ++c) {
              products[r] += g.value[c] * w[a].value[c];
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

  __device__ void write_total() const {
    compute_t sum = 0;
    for (int64_t i = threadIdx.x; i < count; i += kBlockThreads) {
      sum += terms[i];
    }
    sum = Team<kBlockThreads>{}.sum(sum);
    if (threadIdx.x == 0) {
      *total = sum;
    }
  }
};

// The last block adds up the terms, if there are any.
template <typename Gradients>
__global__ void __launch_bounds__(kBlockThreads)
    layer_gradients_kernel(const Gradients gradients, int64_t blocks_of_weight, int64_t blocks_of_gradients,
                           int64_t blocks) {
  wait_for_previous();
  __shared__ typename Gradients::compute_t shared[kWarps][Gradients::kSums][32];
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    if (block < blocks_of_weight) {
      gradients.write_weight(block, {shared});
    } else if (block < blocks_of_gradients) {
      gradients.write_h(block - blocks_of_weight, {shared});
    } else {
      gradients.write_total();
    }
    __syncthreads();  // before the next block's sums overwrite the ones in `shared`
  }
}

}  // namespace

void compute(const SmallBatchGradients& call, Stream stream) {
  const SmallBatchLayer& layer = call.layer;
  const auto launch_for = [&](auto activation, auto type, auto of_output) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = Compute<scalar_t>;
    dispatch_packet<scalar_t>(
        {{layer.h, layer.H}, {layer.weight, layer.H}, {call.grad, layer.D}, {call.output, layer.D}}, [&](auto n) {
          using Gradients = LayerGradientsOf<n, scalar_t, decltype(activation), of_output>;
          const Gradients gradients = {operands_of<scalar_t>(layer),
                                       static_cast<const scalar_t*>(call.grad),
                                       static_cast<const scalar_t*>(call.output),
                                       call.output_activation,
                                       static_cast<scalar_t*>(call.grad_weight),
                                       static_cast<scalar_t*>(call.grad_bias),
                                       static_cast<scalar_t*>(call.grad_a),
                                       activation,
                                       static_cast<const compute_t*>(call.terms.value),
                                       call.terms.count,
                                       static_cast<compute_t*>(call.terms.total)};
          const int64_t of_weight = gradients.blocks_of_weight(), of_gradients = of_weight + gradients.blocks_of_h();
          const int64_t blocks = of_gradients + (call.terms.total == nullptr ? 0 : 1);
          launch(stream, layer_gradients_kernel<Gradients>, blocks, kBlockThreads, gradients, of_weight, of_gradients,
                 blocks);
        });
  };
  dispatch_activation_and_floating(call.activation, layer.dtype, [&](auto activation, auto type) {
    call.output == nullptr ? launch_for(activation, type, std::false_type{})
                           : launch_for(activation, type, std::true_type{});
  });
}

}  // namespace wakesleep::cuda
