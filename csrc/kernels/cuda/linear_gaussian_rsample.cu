#include "../densities.h"
#include "small_batch.cuh"

namespace wakesleep::cuda {
namespace {

// The two lanes that receive mu and logvar of an element draw every other sample each.
template <typename scalar_t>
struct WriteGaussianSample {
  using compute_t = Compute<scalar_t>;
  const compute_t* __restrict__ bias;
  const int64_t* __restrict__ key;
  scalar_t* __restrict__ z;
  int64_t N, K, samples;

  __device__ void operator()(int64_t row, int64_t column, Pair<compute_t> product) const {
    const bool is_second = column >= K;
    const int64_t k = is_second ? column - K : column;
    // The same bits as those of two ops, the first of which stores mu and logvar in their dtype.
    const compute_t mu = static_cast<scalar_t>(product.first + bias[k]);
    const compute_t logvar = static_cast<scalar_t>(product.second + bias[K + k]);
    const compute_t sigma = sigma_for<scalar_t>(logvar);
    const ScheduledKey scheduled = read_key(key);
#pragma unroll 4
    for (int64_t sample = is_second; sample < samples; sample += 2) {
      const int64_t element = (sample * N + row) * K + k;
      z[element] =
          static_cast<scalar_t>(mu + sigma * draw_element<NormalsFor<scalar_t>, compute_t>(scheduled, element));
    }
  }
};

}  // namespace

void compute(const SmallBatchGaussianSample& call, Stream stream) {
  dispatch_floating(call.layer.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    const int64_t K = call.layer.D / 2;
    launch_layer<scalar_t>(stream, call.layer,
                           WriteGaussianSample<scalar_t>{static_cast<const Compute<scalar_t>*>(call.bias), call.key,
                                                         static_cast<scalar_t*>(call.z), call.layer.N, K, call.samples},
                           PairedColumns{K});
  });
}

}  // namespace wakesleep::cuda
