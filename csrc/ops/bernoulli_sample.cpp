// x ~ Bernoulli(s(logits)): x = [u <= s(a)] for a uniform u in (0, 1].
#include <c10/util/accumulate.h>

#include "bernoulli.h"
#include "members.h"
#include "register.h"

namespace wakesleep {
namespace {

at::Tensor bernoulli_sample(const at::Tensor& logits_in,  // [*B, D]
                            const at::Tensor& key,        // [2] or [*M, 2]
                            at::IntArrayRef sample_shape, std::optional<at::ScalarType> dtype_in) {
  constexpr auto op = "bernoulli_sample";
  int64_t samples = c10::multiply_integers(sample_shape);
  const at::ScalarType dtype = dtype_in.value_or(logits_in.scalar_type());
  check_floating(op, {"logits", logits_in});
  check_event(op, {"logits", logits_in});
  check_sizes(op, "sample_shape", sample_shape);
  const at::Tensor logits = with_contiguous_events(logits_in);
  const auto batch = batch_sizes(logits);
  const int64_t D = logits.size(-1);
  const Members members(op, key, {"logits", logits_in}, batch);
  const at::Tensor x = at::empty(members.draw_shape(sample_shape, {D}),  // uint8 or the dtype of the logits
                                 logits.options().dtype(written_dtype(op, dtype, logits.scalar_type())));
  if (x.numel() == 0) {
    samples = 0;  // the output is empty, so there is nothing to draw
  }
  const std::array<at::DimVector, 1> strides = {row_strides(logits, batch)};
  const auto rows = members.rows<1>(strides);
  members.for_each<1>(strides, [&](int64_t member, const int64_t* member_key, const RowOffsets<1>& first) {
    compute(x.device(), BernoulliSample{dtype_of(logits), dtype_of(x), read(logits, first.of[0]), member_key,
                                        write(x, member * samples * rows.rows * D), rows, samples, D});
  });
  return as_dtype(x, dtype);
}

}  // namespace

WAKESLEEP_OPS(m) { m.impl("bernoulli_sample", bernoulli_sample); }

}  // namespace wakesleep
