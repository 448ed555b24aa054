// What the GEMM kernels share.
#pragma once

#include "../gemm.h"
#include "vector.h"

namespace wakesleep::cpu {

// Calls body(n) with n = min(count, most) as a compile-time constant.
template <int most, typename Body>
WAKESLEEP_INLINE void for_at_most(int64_t count, const Body& body) {
  if constexpr (most > 1) {
    if (count < most) {
      return for_at_most<most - 1>(count, body);
    }
  }
  body(std::integral_constant<int, most>{});
}

template <typename T>
struct Strided {
  T* data;
  int64_t row, column;  // strides

  WAKESLEEP_INLINE T* at(int64_t m, int64_t n) const { return data + m * row + n * column; }
  WAKESLEEP_INLINE Strided from(int64_t m, int64_t n) const { return {at(m, n), row, column}; }
};

template <typename T>
Strided<const T> strided(const Matrix& matrix) {
  return {static_cast<const T*>(matrix.data), matrix.row, matrix.column};
}

// Returns the smallest number of tiles that is worth a separate thread.
inline int64_t grain_of(int64_t multiplications) {
  constexpr int64_t kGrain = 1 << 18;
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, multiplications));
}

}  // namespace wakesleep::cpu
