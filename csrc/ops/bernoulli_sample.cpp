// x ~ Bernoulli(s(logits)): x = [u <= s(a)] for a uniform u in (0, 1].
#include <c10/util/accumulate.h>

#include "bernoulli.h"
#include "register.h"

namespace wakesleep {
namespace {

at::Tensor bernoulli_sample(const at::Tensor& logits_in,  // [*B, D]
                            const at::Tensor& key_in,     // [2]
                            at::IntArrayRef sample_shape, std::optional<at::ScalarType> dtype_in) {
  constexpr auto op = "bernoulli_sample";
  int64_t samples = c10::multiply_integers(sample_shape);
  const at::ScalarType dtype = dtype_in.value_or(logits_in.scalar_type());
  check_floating(op, {"logits", logits_in});
  check_event(op, {"logits", logits_in});
  check_key(op, key_in, {"logits", logits_in});
  check_sample_shape(op, sample_shape);
  const at::Tensor logits = with_contiguous_events(logits_in), key = key_in.contiguous();
  const at::Tensor x = at::empty(concat(sample_shape, logits.sizes()),  // [*S, *B, D], uint8 or the dtype of the logits
                                 logits.options().dtype(written_dtype(op, dtype, logits.scalar_type())));
  if (x.numel() == 0) {
    samples = 0;  // the output is empty, so there is nothing to draw
  }
  const auto batch = batch_sizes(logits);
  const auto rows = map_rows<1>(batch, {row_strides(logits, batch)});
  compute(x.device(), BernoulliSample{dtype_of(logits), dtype_of(x), read(logits), key.const_data_ptr<int64_t>(),
                                      write(x), rows, samples, logits.size(-1)});
  return as_dtype(x, dtype);
}

}  // namespace

WAKESLEEP_OPS(m) { m.impl("bernoulli_sample", bernoulli_sample); }

}  // namespace wakesleep
