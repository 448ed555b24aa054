// A thread processes 16 bytes of a parameter, and a launch processes up to kTensors parameters.
#include "../adam.h"

#include "rowwise.cuh"

namespace wakesleep::cuda {
namespace {

// The number of elements in a piece. A block processes one piece at a time.
template <typename scalar_t>
constexpr int64_t kPiece = int64_t(kBlockThreads) * kPacket<scalar_t>;

// The number of parameters per launch. Their pointers and the rule must fit in the 4 KB of kernel arguments that every
// GPU allows.
constexpr size_t kTensors = 82;

template <typename scalar_t>
struct AdamTensors {
  AdamPieces<scalar_t, kPiece<scalar_t>> tensor[kTensors];
  int64_t first, end;  // range of piece numbers
};
static_assert(sizeof(AdamTensors<float>) + sizeof(AdamRule) <= 4096);

template <typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads, 2) adam(const AdamTensors<scalar_t> tensors, const AdamRule rule) {
  wait_for_previous();
  using compute_t = Compute<scalar_t>;
  constexpr int n = kPacket<scalar_t>;
  __shared__ AdamStep<compute_t> step;  // computed once per block: float64 pow is slow on some GPUs
  const int64_t first = tensors.first + blockIdx.x;
  int t = 0;
  for (int64_t piece = first; piece < tensors.end; piece += gridDim.x) {
    while (piece >= tensors.tensor[t].end()) {
      ++t;
    }
    const auto& tensor = tensors.tensor[t];
    const int64_t at = (piece - tensor.first) * kPiece<scalar_t> + threadIdx.x * n;
    // The span of a thread beyond the end of the tensor holds no element, since its last one is before its first.
    const Span<n, false> span = {at, 0, static_cast<int>(min(int64_t(n), tensor.size - at))};
    const auto gradient = load<compute_t>(span, tensor.gradient);
    auto parameter = load<compute_t, Written>(span, tensor.parameter);
    auto exp_avg = load<compute_t, Written>(span, tensor.exp_avg);
    auto exp_avg_sq = load<compute_t, Written>(span, tensor.exp_avg_sq);
    if (piece == first) {  // one thread computes the step while the loads are in flight
      if (threadIdx.x == 0) {
        step = rule.template read<compute_t>();
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < n; ++i) {
      step(gradient.value[i], parameter.value[i], exp_avg.value[i], exp_avg_sq.value[i]);
    }
    store(span, parameter, tensor.parameter);
    store(span, exp_avg, tensor.exp_avg);
    store(span, exp_avg_sq, tensor.exp_avg_sq);
  }
}

}  // namespace

void compute(const Adam& call, Stream stream) {
  dispatch_floating(call.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    const auto all = divide<scalar_t, kPiece<scalar_t>>(call);
    for (size_t first = 0; first < all.size(); first += kTensors) {
      const size_t count = std::min(kTensors, all.size() - first);
      AdamTensors<scalar_t> tensors = {{}, all[first].first, all[first + count - 1].end()};
      std::copy_n(all.begin() + first, count, tensors.tensor);
      launch(stream, adam<scalar_t>, tensors.end - tensors.first, kBlockThreads, tensors, call.rule);
    }
  });
}

}  // namespace wakesleep::cuda
