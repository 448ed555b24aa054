#include "../binarize.h"

#undef NDEBUG  // the assertion below is part of every build: the host does not read an index on a GPU
#include <cassert>

#include "bernoulli_rows.cuh"

namespace wakesleep::cuda {
namespace {

template <typename grey_t, typename x_t, int word>
struct BinarizeRows {
  static constexpr int kBlocks = kBlocksOfSampler<grey_t>;
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
    draw_row<grey_t, word>(team, read_key(key), row * D, D, probability, values, x + row * D);
  }
};

template <typename x_t>
void launch_binarize(const Binarize& call, Stream stream) {
  auto* x = static_cast<x_t*>(call.x);
  const uint64_t starts = places(call.grey) | places(x);
  const auto rows_of = [&](auto word, int64_t D) {
    return BinarizeRows<uint8_t, x_t, word>{call.grey,          call.index,  call.key, x,
                                            OfGrey{call.white}, call.images, D,        call.stride};
  };
  constexpr int n = kDrawPacket<uint8_t>;
  if (call.index == nullptr && call.stride == call.D && starts % n == 0) {
    launch_one_row<uint8_t, n>(stream, call.rows * call.D,
                               rows_of(std::integral_constant<int, n>{}, call.rows * call.D));
  } else {
    dispatch_word<n>(starts | call.stride | call.D, [&](auto word) {
      launch_free_rows<uint8_t, n>(stream, call.rows, call.D, rows_of(word, call.D));
    });
  }
}

}  // namespace

void compute(const Binarize& call, Stream stream) {
  call.x_dtype == Dtype::uint8 ? launch_binarize<uint8_t>(call, stream) : launch_binarize<float>(call, stream);
}

}  // namespace wakesleep::cuda
