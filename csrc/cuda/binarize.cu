// x ~ Bernoulli(grey / white) for the images that an index selects, on CUDA.
#include "../bernoulli.h"
#include "../registration.h"
#include "bernoulli_rows.cuh"

namespace wakesleep::cuda {
namespace {

template <typename grey_t, typename x_t>
struct BinarizeRows {
  const grey_t* __restrict__ grey;
  const int64_t* __restrict__ index;  // if null, all rows are used in order
  const int64_t* __restrict__ key;
  x_t* __restrict__ x;
  OfGrey probability;
  int64_t N, D;
  int64_t stride;  // row stride of grey

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t row) const {
    const int64_t image = index == nullptr ? row : index[row];
    CUDA_KERNEL_ASSERT(image >= 0 && image < N && "binarize: expected index to be one of the rows of grey");
    const StoredLogits<grey_t, float> values = {grey + image * stride};
    draw_row<kPhiloxWords>(team, read_key(key), row * D, D, probability, values, x + row * D);
  }
};

at::Tensor binarize(const at::Tensor& grey,  // [N, D]
                    const at::Tensor& key,   // [2]
                    int64_t white,
                    const std::optional<at::Tensor>& index,  // [B]
                    std::optional<at::ScalarType> dtype) {
  const c10::cuda::CUDAGuard guard(grey.device());
  const Binarize call(grey, key, white, index, dtype);
  call.dispatch([&](auto type) {
    using x_t = typename decltype(type)::type;
    launch_free_rows<kPhiloxWords>(
        call.rows, call.D,
        BinarizeRows<uint8_t, x_t>{call.grey.const_data_ptr<uint8_t>(), call.index_data(),
                                   call.key.const_data_ptr<int64_t>(), call.x.mutable_data_ptr<x_t>(),
                                   OfGrey{call.white}, call.N, call.D, call.grey.stride(0)});
  });
  return call.result();
}

}  // namespace

WAKESLEEP_KERNELS(CUDA, m) { m.impl("binarize", binarize); }

}  // namespace wakesleep::cuda
