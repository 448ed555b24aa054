// Computes GEMMs on the CPU. Small batches (skinny GEMMs) use the kernels in this file.
//
// The platform's BLAS packs the operands, and makes a separate pass to scale the output before accumulating into it.
// Packing pays off if each packed copy is read many times. With 20 rows, however, a weight matrix is read only five
// times, and its gradient is a sum of only 20 outer products. So these kernels read the operands without packing, and
// write the output once. They keep the sums of a tile in registers and prefetch the operands of the next tiles.
#include "products.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cmath>

#include "vec.h"

namespace wakesleep::cpu {
namespace {

// If a batch has at most this many rows, our kernels are at least as fast as MKL. We measured this on a Zen 3 with
// AVX2.
constexpr int64_t kSmallBatch = 64;

// ---- vectors ----------------------------------------------------------------------------------------------------

// Unrolls loops over arrays, so that the arrays stay in registers.
#define WAKESLEEP_UNROLL _Pragma("GCC unroll 16")

// Operations on a vector register of `bytes` bytes.
template <typename T, int bytes>
struct Vector {
  static constexpr int width = bytes / static_cast<int>(sizeof(T));
  typedef T Lanes __attribute__((vector_size(bytes)));
  typedef T Stored __attribute__((vector_size(bytes), aligned(alignof(T)), may_alias));

  static C10_ALWAYS_INLINE Lanes load(const T* from) { return *reinterpret_cast<const Stored*>(from); }
  static C10_ALWAYS_INLINE void store(T* to, Lanes lanes) { *reinterpret_cast<Stored*>(to) = lanes; }

  // Loads the first `count` lanes and sets the other lanes to zero.
  static C10_ALWAYS_INLINE Lanes load(const T* from, int64_t count) {
    return load(RaggedEnd<T, width>(from, count).lane);
  }

  static C10_ALWAYS_INLINE void store(T* to, Lanes lanes, int64_t count) {
    T lane[width];
    store(lane, lanes);
#pragma omp simd
    for (int l = 0; l < width; ++l) {
      if (l < count) {
        to[l] = lane[l];
      }
    }
  }

  static C10_ALWAYS_INLINE Lanes all(T value) {
    Lanes lanes;
    WAKESLEEP_UNROLL
    for (int l = 0; l < width; ++l) {
      lanes[l] = value;
    }
    return lanes;
  }

  // Returns a b + c, rounded once (a fused multiply-add). Fusing halves the number of arithmetic instructions. It also
  // changes the last bits of a GEMM, so these bits may differ between instruction sets.
  static C10_ALWAYS_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
    WAKESLEEP_UNROLL
    for (int l = 0; l < width; ++l) {
      c[l] = std::fma(a[l], b[l], c[l]);
    }
    return c;
  }

  static constexpr int group = 16 / static_cast<int>(sizeof(T));

  // Sums the lanes of each vector in a group, and writes one sum per vector. Each step adds neighbouring lanes in all
  // vectors of the group.
  static C10_ALWAYS_INLINE void sums(const Lanes (&of)[group], T* to) {
    T lane[width];
    store(lane, tree<group>(of));
    fold<width>(lane, to);
  }

 private:
  // Each 16-byte block of the result holds partial sums for all `count` vectors, and each sum covers the same 16-byte
  // block of its vector.
  template <int count>
  static C10_ALWAYS_INLINE Lanes tree(const Lanes* of) {
    if constexpr (count == 1) {
      return *of;
    } else {
      return of_neighbours(tree<count / 2>(of), tree<count / 2>(of + count / 2),
                           std::make_integer_sequence<int, width>());
    }
  }

  template <int... lane>
  static C10_ALWAYS_INLINE Lanes of_neighbours(Lanes a, Lanes b, std::integer_sequence<int, lane...>) {
#if __has_builtin(__builtin_shufflevector)
    return __builtin_shufflevector(a, b, pair(lane)...) + __builtin_shufflevector(a, b, (pair(lane) + 1)...);
#else
    using Index = decltype(a < b);
    return __builtin_shuffle(a, b, Index{pair(lane)...}) + __builtin_shuffle(a, b, Index{(pair(lane) + 1)...});
#endif
  }

  // Returns the index of the first of the two neighbouring lanes whose sum goes to `lane`. The indices of the second
  // vector start at `width`. Each vector provides half of every 16-byte block.
  static constexpr int pair(int lane) {
    const int place = lane % group, half = group / 2;
    return lane - place + 2 * (place % half) + (place < half ? 0 : width);
  }

  // Adds all 16-byte blocks and writes the sum to `to`.
  template <int lanes>
  static C10_ALWAYS_INLINE void fold(const T* from, T* to) {
    if constexpr (lanes == group) {
      std::copy_n(from, group, to);
    } else {
      T half[lanes / 2];
      using Half = Vector<T, static_cast<int>(sizeof(half))>;
      Half::store(half, Half::load(from) + Half::load(from + lanes / 2));
      fold<lanes / 2>(half, to);
    }
  }
};

// The register tile of a GEMM. It has enough accumulators to hide the latency of multiply-adds if the processor starts
// two per cycle. Accumulators and operands fit in 16 registers. A column is one element in the forward kernel, and a
// vector in the backward kernel.
constexpr int kRegisterRows = 4, kRegisterColumns = 3;

// Calls body(n) with n = min(count, most) as a compile-time constant.
template <int most, typename Body>
C10_ALWAYS_INLINE void for_at_most(int64_t count, const Body& body) {
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

  C10_ALWAYS_INLINE T* at(int64_t m, int64_t n) const { return data + m * row + n * column; }
  C10_ALWAYS_INLINE Strided from(int64_t m, int64_t n) const { return {at(m, n), row, column}; }
};

template <typename T>
C10_ALWAYS_INLINE void prefetch(const Strided<T>& a, int64_t first, int64_t last, int64_t column, int64_t columns) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t row = first; row < last; ++row) {
    for (int64_t at = column; at < column + columns; at += kLine) {
      __builtin_prefetch(a.at(row, at));
    }
  }
}

// Returns the smallest number of tiles that is worth a separate thread.
inline int64_t grain_of(int64_t multiplications) {
  constexpr int64_t kGrain = 1 << 18;
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, multiplications));
}

// ---- forward: a b^T, both row-major --------------------------------------------------------------------------------

// Computes y[r, c] = sum_k a[r, k] b[c, k] for a tile. Each lane accumulates every width-th k.
template <typename T, int bytes, int rows, int columns>
C10_ALWAYS_INLINE void dot_tile(const Strided<const T>& a, const Strided<const T>& b, int64_t K, const Strided<T>& y) {
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
      for (int r = 0; r < std::min(V::group, rows - first); ++r) {
        *y.at(first + r, c) = sums[r];
      }
    }
  }
}

// Computes y = a b^T. Threads divide the column tiles. A column tile is a few rows of b, and each tile is multiplied by
// all rows of a.
template <typename T>
void multiply_rows(const Strided<const T>& a, const Strided<const T>& b, int64_t M, int64_t K, int64_t N,
                   const Strided<T>& y) {
  const int64_t row_tiles = (M + kRegisterRows - 1) / kRegisterRows,
                column_tiles = (N + kRegisterColumns - 1) / kRegisterColumns;
  vectorized_parallel_for(
      column_tiles, grain_of(M * K * kRegisterColumns), [&](auto bytes, int64_t begin, int64_t end) {
        for (int64_t n = begin * kRegisterColumns; n < std::min(N, end * kRegisterColumns); n += kRegisterColumns) {
          for_at_most<kRegisterColumns>(N - n, [&](auto columns) {
            for (int64_t tile = 0; tile < row_tiles; ++tile) {
              const int64_t k = K * tile / row_tiles, m = tile * kRegisterRows;
              prefetch(b, n + columns, std::min(N, n + 2 * columns), k, K * (tile + 1) / row_tiles - k);
              for_at_most<kRegisterRows>(M - m, [&](auto rows) {
                dot_tile<T, bytes, rows, columns>(a.from(m, 0), b.from(n, 0), K, y.from(m, n));
              });
            }
          });
        }
      });
}

// ---- backward: a b, b row-major ------------------------------------------------------------------------------------

// The number of rows of b in a block. A block stays in cache while it is multiplied by all rows of a.
constexpr int64_t kBlock = 32;

// Computes to[r, :] = from[r, :] + sum_k a[k, r] b[k, :] for a tile. If the last vector is not full, the caller passes
// its number of elements as `count`.
template <typename T, int bytes, int rows, int vectors, typename... Count>
C10_ALWAYS_INLINE void outer_tile(const T (&a)[kBlock][kRegisterRows], const Strided<const T>& b, int64_t K,
                                  const Strided<const T>& from, const Strided<T>& to, Count... count) {
  using V = Vector<T, bytes>;
  constexpr int full = vectors - static_cast<int>(sizeof...(count));
  const auto for_vectors = [&](const auto& body) {
    WAKESLEEP_UNROLL
    for (int v = 0; v < full; ++v) {
      body(v);
    }
    if constexpr (full < vectors) {
      body(full, count...);
    }
  };
  typename V::Lanes sum[rows][vectors];
  WAKESLEEP_UNROLL
  for (int r = 0; r < rows; ++r) {
    for_vectors([&](int v, auto... n) { sum[r][v] = V::load(from.at(r, v * V::width), n...); });
  }
  for (int64_t k = 0; k < K; ++k) {
    typename V::Lanes of_b[vectors];
    for_vectors([&](int v, auto... n) { of_b[v] = V::load(b.at(k, v * V::width), n...); });
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
    for_vectors([&](int v, auto... n) { V::store(to.at(r, v * V::width), sum[r][v], n...); });
  }
}

template <typename T>
void multiply_columns(const Strided<const T>& a, const Strided<const T>& b, int64_t M, int64_t K, int64_t N,
                      const Strided<T>& y) {
  constexpr int64_t kWidest = kRegisterColumns * 64 / sizeof(T);
  static constexpr T kZeros[kWidest] = {};
  const int64_t row_tiles = (M + kRegisterRows - 1) / kRegisterRows, strips = (N + kWidest - 1) / kWidest;
  const int64_t parts = std::max(row_tiles, strips);
  const auto multiply_part = [&](auto bytes, int64_t first_row, int64_t last_row, int64_t first, int64_t last) {
    constexpr int64_t width = Vector<T, bytes>::width, strip = kRegisterColumns * width;
    for (int64_t k = 0; k < K; k += kBlock) {
      const int64_t count = std::min(kBlock, K - k), following = std::min(kBlock, K - k - count);
      for (int64_t m = first_row; m < last_row; m += kRegisterRows) {
        for_at_most<kRegisterRows>(last_row - m, [&](auto rows) {
          T of_a[kBlock][kRegisterRows];
          for (int64_t i = 0; i < count; ++i) {
            for (int r = 0; r < rows; ++r) {
              of_a[i][r] = *a.at(m + r, k + i);
            }
          }
          const int64_t tile = m / kRegisterRows, next = k + count + following * tile / row_tiles;
          const int64_t next_end = k + count + following * (tile + 1) / row_tiles;
          for (int64_t n = first; n < last; n += strip) {
            prefetch(b, next, next_end, n, strip);
            prefetch(y, m, m + rows, n + 2 * strip, strip);
            const Strided<T> to = y.from(m, n);
            const Strided<const T> from = k > 0 ? Strided<const T>{to.data, to.row, 1} : Strided<const T>{kZeros, 0, 1};
            const int64_t left = last - n;
            for_at_most<kRegisterColumns>((left + width - 1) / width, [&](auto vectors) {
              const auto tile = [&](auto... ragged) {
                outer_tile<T, bytes, rows, vectors>(of_a, b.from(k, n), count, from, to, ragged...);
              };
              left >= vectors* width ? tile() : tile(left - (vectors - 1) * width);
            });
          }
        });
      }
    }
  };
  vectorized_parallel_for(parts, grain_of(M * K * N / parts), [&](auto bytes, int64_t begin, int64_t end) {
    const bool by_rows = parts == row_tiles;
    multiply_part(bytes, by_rows ? begin * kRegisterRows : 0, by_rows ? std::min(M, end * kRegisterRows) : M,
                  by_rows ? 0 : begin * kWidest, by_rows ? N : std::min(N, end * kWidest));
  });
}

// ---- choice of implementation --------------------------------------------------------------------------------------

bool is_small_batch(int64_t rows) { return rows <= small_batch_limit(kSmallBatch); }

// Returns true if our kernels compute the product a b. The batch size is the number of rows of the result. If the
// product is the gradient of a weight, the batch size is instead the number of rows that are summed.
bool is_ours(const at::Tensor& a, const at::Tensor& b) {
  if (instruction_set() == InstructionSet::baseline || a.scalar_type() != b.scalar_type() || a.numel() == 0 ||
      b.numel() == 0) {
    return false;
  }
  return b.stride(1) == 1 ? is_small_batch(a.size(0)) || (a.stride(0) == 1 && is_small_batch(a.size(1)))
                          : b.stride(0) == 1 && a.stride(1) == 1 && is_small_batch(a.size(0));
}

template <typename T>
Strided<const T> operand(const at::Tensor& a) {
  return {a.const_data_ptr<T>(), a.stride(0), a.stride(1)};
}

// Computes y = a b into a contiguous y.
void multiply(const at::Tensor& a, const at::Tensor& b, const at::Tensor& y) {
  const int64_t M = a.size(0), K = a.size(1), N = b.size(1);
  dispatch_computed(y.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Strided<T> to = {y.mutable_data_ptr<T>(), y.stride(0), 1};
    if (b.stride(1) == 1) {
      multiply_columns(operand<T>(a), operand<T>(b), M, K, N, to);
    } else {
      multiply_rows(operand<T>(a), operand<T>(b.t()), M, K, N, to);
    }
  });
}

// Returns true if the processor has AVX-512 but MKL does not use it, because the vendor is not Intel. On such
// processors, oneDNN multiplies twice as fast as MKL. On all other processors, MKL is faster.
bool blas_leaves_out_avx512() {
#ifdef __x86_64__
  return at::hasMKL() && __builtin_cpu_supports("avx512f") && !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

// Returns the operator that computes x weight^T with oneDNN, if this torch has the operator.
using OneDnnLinear = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                                std::string_view, c10::List<std::optional<at::Scalar>>,
                                std::optional<std::string_view>);
const std::optional<c10::TypedOperatorHandle<OneDnnLinear>>& onednn_linear() {
  static const auto found = []() -> std::optional<c10::TypedOperatorHandle<OneDnnLinear>> {
    const auto op = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    return op ? std::optional(op->typed<OneDnnLinear>()) : std::nullopt;
  }();
  return found;
}

// Returns true if a [M, N] is row-major or column-major, possibly with padding between rows or columns.
bool is_plain(const at::Tensor& a) {
  const auto M = a.size(0), N = a.size(1), row = a.stride(0), column = a.stride(1);
  return (column == 1 && row >= std::max<int64_t>(1, N)) || (row == 1 && column >= std::max<int64_t>(1, M));
}

bool is_for_onednn(const at::Tensor& a, const at::Tensor& b) {
  constexpr int64_t kWorthwhile = 1 << 20;  // if a GEMM is smaller, setting up the call costs more than it saves
  static const bool is_better = blas_leaves_out_avx512() && onednn_linear();
  return is_better && a.scalar_type() == at::kFloat && a.numel() * b.size(1) >= kWorthwhile && is_plain(a) &&
         is_plain(b) && at::globalContext().userEnabledMkldnn();
}

}  // namespace

at::Tensor Products::product(const at::Tensor& a, const at::Tensor& b, at::ScalarType type) {
  if (is_ours(a, b)) {
    const at::Tensor y = aten::empty({a.size(0), b.size(1)}, a.options());
    multiply(a, b, y);
    return in_type(y, type);
  }
  if (is_for_onednn(a, b)) {
    return in_type(onednn_linear()->call(a, b.t(), {}, "none", c10::List<std::optional<at::Scalar>>(), {}), type);
  }
  return in_type(a.mm(b), type);
}

void Products::add_product(const at::Tensor& sum, const at::Tensor& a, const at::Tensor& b) {
  if (is_for_onednn(a, b)) {
    sum.add_(product(a, b, sum.scalar_type()));
  } else {
    sum.addmm_(a, b);
  }
}

}  // namespace wakesleep::cpu
