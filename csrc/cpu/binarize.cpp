// x ~ Bernoulli(grey / white) for the images that an index selects, on the CPU.
#include "../bernoulli.h"
#include "../registration.h"
#include "bernoulli_rows.h"

namespace wakesleep::cpu {
namespace {

at::Tensor binarize(const at::Tensor& grey,  // [N, D]
                    const at::Tensor& key,   // [2]
                    int64_t white,
                    const std::optional<at::Tensor>& index,  // [B]
                    std::optional<at::ScalarType> dtype) {
  const Binarize call(grey, key, white, index, dtype);
  const int64_t* image = call.index_data();
  for (int64_t row = 0; image != nullptr && row < call.rows; ++row) {
    TORCH_CHECK_INDEX(image[row] >= 0 && image[row] < call.N, call.op, ": expected index in 0 .. ", call.N - 1,
                      ", the rows of grey, got ", image[row]);
  }
  const auto* grey_data = call.grey.const_data_ptr<uint8_t>();
  const auto values_of = [&](int64_t row) {
    return StoredLogits<uint8_t>{grey_data + (image == nullptr ? row : image[row]) * call.grey.stride(0)};
  };
  call.dispatch([&](auto type) {
    using x_t = typename decltype(type)::type;
    draw_rows<float>(read_key(call.key), 0, call.rows, call.D, OfGrey{call.white}, values_of,
                     call.x.mutable_data_ptr<x_t>());
  });
  return call.result();
}

}  // namespace

WAKESLEEP_KERNELS(CPU, m) { m.impl("binarize", binarize); }

}  // namespace wakesleep::cpu
