// The platform's BLAS packs the operands, and makes a separate pass to scale the output before accumulating into it.
// Packing pays off if each packed copy is read many times. With 20 rows, however, a weight matrix is read only five
// times, and its gradient is a sum of only 20 outer products. So these kernels read the operands without packing, and
// write the output once. They keep the sums of a tile in registers and prefetch the operands of the next tiles.
#include "gemm.h"

namespace wakesleep::cpu {
namespace {

// The register tile of a GEMM has 4 rows. Its width is a number of elements in the forward kernel, and of vectors in
// the backward kernel. A tile has enough accumulators to hide the latency of multiply-adds if the processor starts two
// per cycle. Accumulators and operands fit in the registers: 16 of AVX2, or 32 of AVX-512.
constexpr int kRegisterRows = 4, kRegisterVectors = 3;
template <int bytes>
constexpr int kRegisterColumns = bytes == 64 ? 6 : 3;

// Threads divide the columns in multiples of this number, which is a multiple of the width of every tile.
constexpr int kMostColumns = kRegisterColumns<64>;

template <typename T>
WAKESLEEP_INLINE void prefetch(const Strided<T>& a, int64_t first, int64_t last, int64_t column, int64_t columns) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t row = first; row < last; ++row) {
    for (int64_t at = column; at < column + columns; at += kLine) {
      __builtin_prefetch(a.at(row, at));
    }
  }
}

// ---- forward: a b^T, both row-major --------------------------------------------------------------------------------

// Computes y[r, c] = sum_k a[r, k] b[c, k] for a tile. Each lane accumulates every width-th k. Meanwhile, the loop
// prefetches what lies `ahead` elements after b, so that the prefetches do not wait for each other.
template <typename T, int bytes, int rows, int columns>
WAKESLEEP_INLINE void dot_tile(const Strided<const T>& a, const Strided<const T>& b, int64_t K, const Strided<T>& y,
                               int64_t ahead) {
  using V = Vector<T, bytes>;
  typename V::Lanes sum[rows][columns];
  WAKESLEEP_UNROLL
  for (int r = 0; r < rows; ++r) {
    WAKESLEEP_UNROLL
    for (int c = 0; c < columns; ++c) {
      sum[r][c] = V::all(0);
    }
  }
  const auto add = [&](const auto& load) {
    typename V::Lanes of_b[columns];
    WAKESLEEP_UNROLL
    for (int c = 0; c < columns; ++c) {
      of_b[c] = load(b.at(c, 0));
    }
    WAKESLEEP_UNROLL
    for (int r = 0; r < rows; ++r) {
      const typename V::Lanes of_a = load(a.at(r, 0));
      WAKESLEEP_UNROLL
      for (int c = 0; c < columns; ++c) {
        sum[r][c] = V::multiply_add(of_a, of_b[c], sum[r][c]);
      }
    }
  };
  int64_t k = 0;
  for (; k + V::width <= K; k += V::width) {
    add([k](const T* row) { return V::load(row + k); });
    WAKESLEEP_UNROLL
    for (int c = 0; c < columns; ++c) {
      __builtin_prefetch(b.at(c, k) + ahead);
    }
  }
  if (k < K) {
    add([k, K](const T* row) { return V::load(row + k, K - k); });
  }
  WAKESLEEP_UNROLL
  for (int first = 0; first < rows; first += V::group) {
    WAKESLEEP_UNROLL
    for (int c = 0; c < columns; ++c) {
      typename V::Lanes of_rows[V::group];
      WAKESLEEP_UNROLL
      for (int r = 0; r < V::group; ++r) {
        of_rows[r] = first + r < rows ? sum[first + r][c] : V::all(0);
      }
      T sums[V::group];
      V::sums(of_rows, sums);
      WAKESLEEP_UNROLL
      for (int r = 0; r < V::group; ++r) {
        if (first + r < rows) {
          *y.at(first + r, c) = sums[r];
        }
      }
    }
  }
}

// Computes y = a b^T. Threads divide the column tiles. A column tile is a few rows of b, and each tile is multiplied by
// all rows of a.
template <typename T>
void multiply_rows(const Strided<const T>& a, const Strided<const T>& b, int64_t M, int64_t K, int64_t N,
                   const Strided<T>& y) {
  const int64_t row_tiles = (M + kRegisterRows - 1) / kRegisterRows, parts = (N + kMostColumns - 1) / kMostColumns;
  vectorized_parallel_for(parts, grain_of(M * K * kMostColumns), [&](auto bytes, int64_t begin, int64_t end) {
    constexpr int most = kRegisterColumns<bytes>;
    for (int64_t n = begin * kMostColumns; n < std::min(N, end * kMostColumns); n += most) {
      for_at_most<most>(N - n, [&](auto columns) {
        for (int64_t tile = 0; tile < row_tiles; ++tile) {
          const int64_t m = tile * kRegisterRows, ahead = tile == 0 && n + 2 * columns <= N ? columns * b.row : 0;
          for_at_most<kRegisterRows>(M - m, [&](auto rows) {
            run_apart<bytes>(
                K, [a = a.from(m, 0), b = b.from(n, 0), y = y.from(m, n), ahead](auto of_size, int64_t, int64_t K) {
                  dot_tile<T, of_size, decltype(rows)::value, decltype(columns)::value>(a, b, K, y, ahead);
                });
          });
        }
      });
    }
  });
}

// Computes y = a b^T for a single row a. The tiles exchange a and b, so the four rows of a tile are rows of b. They
// hide more of the latency, and one reduction makes four results. Each result has the bits that it has in a batch.
template <typename T>
void multiply_row(const Strided<const T>& a, const Strided<const T>& b, int64_t K, int64_t N, T* y) {
  const int64_t tiles = (N + kRegisterRows - 1) / kRegisterRows;
  vectorized_parallel_for(tiles, grain_of(K * kRegisterRows), [&](auto bytes, int64_t begin, int64_t end) {
    for (int64_t n = begin * kRegisterRows; n < std::min(N, end * kRegisterRows); n += kRegisterRows) {
      for_at_most<kRegisterRows>(N - n, [&](auto rows) {
        prefetch(b, n + rows, std::min(N, n + 2 * rows), 0, K);
        dot_tile<T, bytes, rows, 1>(b.from(n, 0), a, K, {y + n, 1, 1}, 0);
      });
    }
  });
}

// ---- backward: a b, b row-major ------------------------------------------------------------------------------------

// The number of rows of b in a block. A block stays in cache while it is multiplied by all rows of a.
constexpr int64_t kBlock = 32;

// Computes to[r, :] = from[r, :] + sum_k a[k, r] b[k, :] for a tile. The sum over k is complete before it is added: one
// chain of all additions would lose up to four times as much to rounding. If is_ragged is true, the last vector of a
// row has only `last` elements.
template <typename T, int bytes, int rows, int vectors, bool is_ragged>
WAKESLEEP_INLINE void outer_tile(const T (&a)[kBlock][kRegisterRows], const Strided<const T>& b, int64_t K,
                                 const Strided<const T>& from, const Strided<T>& to, int64_t last) {
  using V = Vector<T, bytes>;
  typename V::Lanes sum[rows][vectors];
  WAKESLEEP_UNROLL
  for (int r = 0; r < rows; ++r) {
    WAKESLEEP_UNROLL
    for (int v = 0; v < vectors; ++v) {
      sum[r][v] = V::all(0);
    }
  }
  for (int64_t k = 0; k < K; ++k) {
    typename V::Lanes of_b[vectors];
    V::template load<is_ragged>(of_b, b.at(k, 0), last);
    WAKESLEEP_UNROLL
    for (int r = 0; r < rows; ++r) {
      const typename V::Lanes of_a = V::all(a[k][r]);
      WAKESLEEP_UNROLL
      for (int v = 0; v < vectors; ++v) {
        sum[r][v] = V::multiply_add(of_a, of_b[v], sum[r][v]);
      }
    }
  }
  WAKESLEEP_UNROLL
  for (int r = 0; r < rows; ++r) {
    typename V::Lanes before[vectors];
    V::template load<is_ragged>(before, from.at(r, 0), last);
    WAKESLEEP_UNROLL
    for (int v = 0; v < vectors; ++v) {
      sum[r][v] = before[v] + sum[r][v];
    }
    V::template store<is_ragged>(to.at(r, 0), sum[r], last);
  }
}

// The rows and columns of y that a thread computes.
struct Part {
  int64_t first_row, last_row;
  int64_t first_column, last_column;
};

// Copies a[m .. m + rows - 1, k .. k + count - 1], transposed.
template <int rows, typename T>
WAKESLEEP_INLINE void transpose(const Strided<const T>& a, int64_t m, int64_t k, int64_t count,
                                T (&to)[kBlock][kRegisterRows]) {
  for (int64_t i = 0; i < count; ++i) {
    for (int r = 0; r < rows; ++r) {
      to[i][r] = *a.at(m + r, k + i);
    }
  }
}

// Computes a part of y = a b. While a block of b is multiplied by all rows of a, each row tile prefetches its share of
// the next block.
template <typename T, int bytes>
WAKESLEEP_INLINE void multiply_part(const Strided<const T>& a, const Strided<const T>& b, int64_t M, int64_t K,
                                    const Strided<T>& y, const Part& part) {
  constexpr int64_t width = Vector<T, bytes>::width, strip = kRegisterVectors * width;
  static constexpr T kZeros[kRegisterVectors * 64 / sizeof(T)] = {};
  const int64_t row_tiles = (M + kRegisterRows - 1) / kRegisterRows;
  for (int64_t k = 0; k < K; k += kBlock) {
    const int64_t count = std::min(kBlock, K - k), following = std::min(kBlock, K - k - count);
    for (int64_t m = part.first_row; m < part.last_row; m += kRegisterRows) {
      for_at_most<kRegisterRows>(part.last_row - m, [&](auto rows) {
        T of_a[kBlock][kRegisterRows];
        transpose<rows>(a, m, k, count, of_a);
        const int64_t tile = m / kRegisterRows, next = k + count + following * tile / row_tiles;
        const int64_t next_end = k + count + following * (tile + 1) / row_tiles;
        for (int64_t n = part.first_column; n < part.last_column; n += strip) {
          prefetch(b, next, next_end, n, strip);
          prefetch(y, m, m + rows, n + 2 * strip, strip);
          const Strided<T> to = y.from(m, n);
          const Strided<const T> from = k > 0 ? Strided<const T>{to.data, to.row, 1} : Strided<const T>{kZeros, 0, 1};
          const int64_t left = part.last_column - n;
          for_at_most<kRegisterVectors>((left + width - 1) / width, [&](auto vectors) {
            if (left >= vectors * width) {
              outer_tile<T, bytes, rows, vectors, false>(of_a, b.from(k, n), count, from, to, width);
            } else {
              outer_tile<T, bytes, rows, vectors, true>(of_a, b.from(k, n), count, from, to,
                                                        left - (vectors - 1) * width);
            }
          });
        }
      });
    }
  }
}

// Computes y = a b. Threads divide the row tiles or the column strips, whichever are more.
template <typename T>
void multiply_columns(const Strided<const T>& a, const Strided<const T>& b, int64_t M, int64_t K, int64_t N,
                      const Strided<T>& y) {
  constexpr int64_t kWidest = kRegisterVectors * 64 / sizeof(T);
  const int64_t row_tiles = (M + kRegisterRows - 1) / kRegisterRows, strips = (N + kWidest - 1) / kWidest;
  const int64_t parts = std::max(row_tiles, strips);
  vectorized_parallel_for(parts, grain_of(M * K * N / parts), [&](auto bytes, int64_t begin, int64_t end) {
    const Part part = parts == row_tiles ? Part{begin * kRegisterRows, std::min(M, end * kRegisterRows), 0, N}
                                         : Part{0, M, begin * kWidest, std::min(N, end * kWidest)};
    multiply_part<T, bytes>(a, b, M, K, y, part);
  });
}

}  // namespace

void compute(const SkinnyGemm& call, Stream) {
  dispatch_computed(call.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Strided<T> y = {static_cast<T*>(call.y), call.N, 1};
    const auto a = strided<T>(call.a), b = strided<T>(call.b);
    const Strided<const T> b_transposed = {b.data, b.column, b.row};
    if (b.column == 1) {
      multiply_columns(a, b, call.M, call.K, call.N, y);
    } else if (call.M == 1) {
      multiply_row(a, b_transposed, call.K, call.N, y.data);
    } else {
      multiply_rows(a, b_transposed, call.M, call.K, call.N, y);
    }
  });
}

}  // namespace wakesleep::cpu
