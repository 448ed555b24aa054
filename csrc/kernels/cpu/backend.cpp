#include "../backend.h"

namespace wakesleep::cpu {
namespace {

template <typename... Calls>
constexpr KernelsFor<Calls...> all_of(Type<KernelsFor<Calls...>>) {
  return {static_cast<Kernel<Calls>>(&compute)...};
}

int64_t rows_of_sum(Dtype) { return kPieceRows; }

}  // namespace

const Backend kBackend = {all_of(Type<Kernels>{}), nullptr, &compute, &compute, nullptr, 0, &rows_of_sum};

}  // namespace wakesleep::cpu
