// How the packed GEMM divides its operands, and copies them in the order in which it reads them.
#pragma once

#include "gemm.h"

namespace wakesleep::cpu {

// The register tile has enough accumulators to hide the latency of multiply-adds if the processor starts two per cycle.
// With a panel's vectors and one element of a, they fit in 16 registers.
constexpr int kTileRows = 6, kTileVectors = 2;

struct Part {
  int64_t first, count;
};

// Divides 0 .. count - 1 evenly into parts of at most `most`. The first parts are the longer ones, so that a branch on
// the length of a part is easy to predict.
struct Parts {
  int64_t number, shorter, longer;  // number of all parts; length of the shorter ones; number of the longer ones

  WAKESLEEP_INLINE Parts(int64_t count, int64_t most)
      : number((count + most - 1) / most), shorter(count / number), longer(count - number * shorter) {}

  WAKESLEEP_INLINE Part operator[](int64_t i) const {
    return {i * shorter + std::min(i, longer), shorter + (i < longer)};
  }
};

// Exchanges the off-diagonal blocks of size `step` of each square of `group` lanes in the rows a and b.
template <typename V, int step, int... lane>
WAKESLEEP_INLINE void exchange(typename V::Lanes& a, typename V::Lanes& b, std::integer_sequence<int, lane...>) {
  const typename V::Lanes low = V::template shuffle<((lane & step) != 0 ? V::width + lane - step : lane)...>(a, b);
  b = V::template shuffle<((lane & step) != 0 ? V::width + lane : lane + step)...>(a, b);
  a = low;
}

// Transposes each square of `group` lanes in `group` rows.
template <typename V, int step = 1>
WAKESLEEP_INLINE void transpose(typename V::Lanes (&rows)[V::group]) {
  if constexpr (step < V::group) {
    WAKESLEEP_UNROLL
    for (int i = 0; i < V::group; ++i) {
      if ((i & step) == 0) {
        exchange<V, step>(rows[i], rows[i + step], std::make_integer_sequence<int, V::width>());
      }
    }
    transpose<V, 2 * step>(rows);
  }
}

// Copies b [K, columns], for at most a vector of columns. Row k of the copy is a vector at to + k * stride. Its lanes
// after the last column hold other elements of b, or zeros.
template <typename V, typename T>
WAKESLEEP_INLINE void pack_vectors(const Strided<const T>& b, int64_t K, int64_t columns, T* to, int64_t stride) {
  int64_t k = 0;
  if (b.column == 1 && columns >= V::width) {
    for (; k < K; ++k) {
      V::store(to + k * stride, V::load(b.at(k, 0)));
    }
  } else if (b.column == 1) {
    for (; k < K; ++k) {
      V::store(to + k * stride, V::load(b.at(k, 0), columns));
    }
  } else if (b.row == 1) {
    const auto pack = [&](auto column_of) {
      for (; k + V::group <= K; k += V::group) {
        typename V::Lanes of_b[V::group];
        WAKESLEEP_UNROLL
        for (int c = 0; c < V::group; ++c) {
          of_b[c] = V::gather([&](int group) { return b.at(k, column_of(c + group * V::group)); });
        }
        transpose<V>(of_b);
        WAKESLEEP_UNROLL
        for (int c = 0; c < V::group; ++c) {
          V::store(to + (k + c) * stride, of_b[c]);
        }
      }
    };
    columns >= V::width ? pack([](int64_t c) { return c; }) : pack([&](int64_t c) { return std::min(c, columns - 1); });
  }
  for (; k < K; ++k) {
    for (int64_t c = 0; c < V::width; ++c) {
      to[k * stride + c] = *b.at(k, std::min(c, columns - 1));
    }
  }
}

// Copies a block of a, tile by tile. A tile of R rows is stored as [K, R]. A vector may overlap the following column or
// tile, which is stored later. After the last tile, there must be room for a vector.
template <typename V, typename T>
WAKESLEEP_INLINE void pack_tiles(const Strided<const T>& a, int64_t M, int64_t K, T* to) {
  const Parts tiles(M, kTileRows);
  for (int64_t t = 0; t < tiles.number; ++t) {
    const auto [m, rows] = tiles[t];
    const bool has_vectors = a.row == 1 && m + V::width <= M;
    for (int64_t k = 0; k < K; ++k, to += rows) {
      if (has_vectors) {
        V::store(to, V::load(a.at(m, k)));
      } else {
        for (int64_t r = 0; r < rows; ++r) {
          to[r] = *a.at(m + r, k);
        }
      }
    }
  }
}

}  // namespace wakesleep::cpu
