#include "../binarize.h"

#include "bernoulli_rows.h"

namespace wakesleep::cpu {

void compute(const Binarize& call, Stream) {
  const auto values_of = [&](int64_t row) {
    return StoredLogits<uint8_t>{call.grey + (call.index == nullptr ? row : call.index[row]) * call.stride};
  };
  const auto draw_to = [&](auto* x) {
    draw_rows<float>(read_key(call.key), 0, call.rows, call.D, OfGrey{call.white}, values_of, x);
  };
  call.x_dtype == Dtype::uint8 ? draw_to(static_cast<uint8_t*>(call.x)) : draw_to(static_cast<float*>(call.x));
}

}  // namespace wakesleep::cpu
