#include "../backend.h"

namespace wakesleep::cpu {
namespace {

template <typename... Calls>
constexpr KernelsFor<Calls...> all_of(Type<KernelsFor<Calls...>>) {
  return {static_cast<Kernel<Calls>>(&compute)...};
}

int64_t rows_of_sum(Dtype) { return kPieceRows; }

}  // namespace

// With at most 64 rows, our skinny GEMM is at least as fast as MKL. We measured this on a Zen 3 with AVX2.
const Backend kBackend = {all_of(Type<Kernels>{}), nullptr, &compute, &compute, nullptr, 64, &rows_of_sum};

}  // namespace wakesleep::cpu
