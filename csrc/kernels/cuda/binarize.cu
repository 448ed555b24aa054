#include "../binarize.h"

#undef NDEBUG  // the assertion below is part of every build: the host does not read an index on a GPU
#include <cassert>

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
    assert(image >= 0 && image < N && "binarize: expected index to be one of the rows of grey");
    const StoredLogits<grey_t, float> values = {grey + image * stride};
    draw_row<kPhiloxWords>(team, read_key(key), row * D, D, probability, values, x + row * D);
  }
};

template <typename x_t>
void launch_binarize(const Binarize& call, Stream stream) {
  launch_free_rows<kPhiloxWords>(stream, call.rows, call.D,
                                 BinarizeRows<uint8_t, x_t>{call.grey, call.index, call.key, static_cast<x_t*>(call.x),
                                                            OfGrey{call.white}, call.images, call.D, call.stride});
}

}  // namespace

void compute(const Binarize& call, Stream stream) {
  call.x_dtype == Dtype::uint8 ? launch_binarize<uint8_t>(call, stream) : launch_binarize<float>(call, stream);
}

}  // namespace wakesleep::cuda
