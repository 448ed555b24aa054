// Adds a number to each of several counters, on a GPU in one kernel.
#include <c10/util/SmallVector.h>

#include "checks.h"
#include "register.h"

namespace wakesleep {
namespace {

constexpr auto kAdvance = "advance_";

Counter counter_of(const Argument& argument, int64_t amount) {
  const at::Tensor& tensor = argument.tensor;
  const auto type = tensor.scalar_type();
  TORCH_CHECK_TYPE(type == at::kLong || type == at::kDouble || type == at::kFloat, kAdvance, ": expected ", argument,
                   " to be int64, float64 or float32, got ", type);
  TORCH_CHECK_VALUE(tensor.dim() <= 1, kAdvance, ": expected ", argument, " to have at most one dimension, got ",
                    tensor.sizes());
  const int64_t size = tensor.numel(), stride = tensor.dim() == 0 ? 1 : tensor.stride(0);
  TORCH_CHECK_VALUE(size <= 1 || stride > 0, kAdvance, ": expected ", argument,
                    " to be no expanded tensor, got strides ", tensor.strides());
  using Type = Counter::Type;
  return {write(tensor),
          type == at::kLong     ? Type::int64
          : type == at::kDouble ? Type::float64
                                : Type::float32,
          size, stride, amount};
}

void advance_(at::TensorList counters,  // [size] or [] each
              at::IntArrayRef amounts) {
  TORCH_CHECK_VALUE(counters.size() == amounts.size(), kAdvance, ": expected amounts to have ", counters.size(),
                    " numbers, as many as counters, got ", amounts.size());
  c10::SmallVector<Counter, 8> all;
  for (size_t i = 0; i < counters.size(); ++i) {
    const Argument counter = {"counters", counters[i], i};
    check_same_device(kAdvance, {"counters", counters[0], 0}, counter);
    all.push_back(counter_of(counter, amounts[i]));
  }
  if (!all.empty()) {
    compute(counters[0].device(), Advance{all.data(), static_cast<int64_t>(all.size())});
  }
}

}  // namespace

WAKESLEEP_OPS(m) { m.impl("advance_", advance_); }

}  // namespace wakesleep
