// A GEMM of the BLIS kind. A panel of b, a few columns that fit in a register tile, is packed into the L1 cache and
// multiplied by a block of a, which stays in the L2 cache. Packing makes the three products of a layer alike: forward,
// the gradient of h and the gradient of weight differ only in the strides of the operands.
//
// The sum of an element runs over k in an order that depends on K alone. So the result does not depend on the other
// rows, nor on the number of threads.
#include "gemm.h"

namespace wakesleep::cpu {
namespace {

// The register tile has enough accumulators to hide the latency of multiply-adds if the processor starts two per cycle.
// With a panel's vectors and one element of a, they fit in 16 registers.
constexpr int kTileRows = 6, kTileVectors = 2;

// A block of a has at most this many rows and columns. Its packed copy and a panel are on the stack, so they take
// 120 kB. We measured depths of 128 to 384 on a Zen 3, which make no difference.
constexpr int64_t kBlockRows = 34 * kTileRows, kDepth = 128;

template <typename T, int bytes>
constexpr int64_t kPanelWidth = kTileVectors * Vector<T, bytes>::width;

// The part i of `count` that is divided evenly into parts of at most `most`.
struct Part {
  int64_t first, count;

  static WAKESLEEP_INLINE int64_t number(int64_t count, int64_t most) { return (count + most - 1) / most; }
  static WAKESLEEP_INLINE Part of(int64_t count, int64_t most, int64_t i) {
    const int64_t parts = number(count, most), first = count * i / parts;
    return {first, count * (i + 1) / parts - first};
  }
};

// ---- packing -------------------------------------------------------------------------------------------------------

// Exchanges the off-diagonal blocks of size `step` of the matrix with rows a and b.
template <typename V, int step, int... lane>
WAKESLEEP_INLINE void exchange(typename V::Lanes& a, typename V::Lanes& b, std::integer_sequence<int, lane...>) {
  const typename V::Lanes low = V::template shuffle<((lane & step) != 0 ? V::width + lane - step : lane)...>(a, b);
  b = V::template shuffle<((lane & step) != 0 ? V::width + lane : lane + step)...>(a, b);
  a = low;
}

template <typename V, int step = 1>
WAKESLEEP_INLINE void transpose(typename V::Lanes (&rows)[V::width]) {
  if constexpr (step < V::width) {
    WAKESLEEP_UNROLL
    for (int i = 0; i < V::width; ++i) {
      if ((i & step) == 0) {
        exchange<V, step>(rows[i], rows[i + step], std::make_integer_sequence<int, V::width>());
      }
    }
    transpose<V, 2 * step>(rows);
  }
}

// Copies b [K, columns], for at most a vector of columns. Row k of the copy is a vector at to + k * stride, with zeros
// after the last column.
template <typename V, typename T>
WAKESLEEP_INLINE void pack_vectors(const Strided<const T>& b, int64_t K, int64_t columns, T* to, int64_t stride) {
  int64_t k = 0;
  if (columns >= V::width && b.column == 1) {
    for (; k < K; ++k) {
      V::store(to + k * stride, V::load(b.at(k, 0)));
    }
  } else if (columns >= V::width && b.row == 1) {
    for (; k + V::width <= K; k += V::width) {
      typename V::Lanes of_b[V::width];
      WAKESLEEP_UNROLL
      for (int l = 0; l < V::width; ++l) {
        of_b[l] = V::load(b.at(k, l));
      }
      transpose<V>(of_b);
      WAKESLEEP_UNROLL
      for (int l = 0; l < V::width; ++l) {
        V::store(to + (k + l) * stride, of_b[l]);
      }
    }
  }
  for (; k < K; ++k) {
    for (int l = 0; l < V::width; ++l) {
      to[k * stride + l] = l < columns ? *b.at(k, l) : T(0);
    }
  }
}

// Copies a block of a, tile by tile. A tile of R rows is stored as [K, R]. A vector may overlap the following column or
// tile, which is stored later. After the last tile, there must be room for a vector.
template <typename V, typename T>
WAKESLEEP_INLINE void pack_tiles(const Strided<const T>& a, int64_t M, int64_t K, T* to) {
  for (int64_t t = 0; t < Part::number(M, kTileRows); ++t) {
    const auto [m, rows] = Part::of(M, kTileRows, t);
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

// ---- multiplying ---------------------------------------------------------------------------------------------------

// Computes y = a panel, or adds it to y, for a tile of y [rows, vectors].
template <typename V, int rows, int vectors, typename T>
WAKESLEEP_INLINE void multiply_tile(const Strided<const T>& a, const T* panel, int64_t K, const Strided<T>& y,
                                    bool adds) {
  typename V::Lanes sum[rows][vectors];
  WAKESLEEP_UNROLL
  for (int r = 0; r < rows; ++r) {
    WAKESLEEP_UNROLL
    for (int v = 0; v < vectors; ++v) {
      sum[r][v] = V::all(0);
    }
    __builtin_prefetch(y.at(r, 0), 1);
  }
  // Two pointers, each with offsets of 0, 1 and 2 rows, need fewer registers than six pointers.
  constexpr int half = rows > kTileRows / 2 ? kTileRows / 2 : 0;
  const T *first = a.data, *second = a.at(half, 0);
  for (const T* end = panel + K * vectors * V::width; panel != end; panel += vectors * V::width) {
    typename V::Lanes of_b[vectors];
    V::template load<false>(of_b, panel, V::width);
    WAKESLEEP_UNROLL
    for (int r = 0; r < rows; ++r) {
      const typename V::Lanes of_a = V::all(r < half || half == 0 ? first[r * a.row] : second[(r - half) * a.row]);
      WAKESLEEP_UNROLL
      for (int v = 0; v < vectors; ++v) {
        sum[r][v] = V::multiply_add(of_a, of_b[v], sum[r][v]);
      }
    }
    first += a.column;
    second += a.column;
  }
  WAKESLEEP_UNROLL
  for (int r = 0; r < rows; ++r) {
    WAKESLEEP_UNROLL
    for (int v = 0; v < vectors; ++v) {
      T* to = y.at(r, v * V::width);
      V::store(to, adds ? V::load(to) + sum[r][v] : sum[r][v]);
    }
  }
}

// A block of a: in place if its rows are contiguous, otherwise packed.
template <typename T>
struct Block {
  Strided<const T> a;
  int64_t M, K;
  bool is_packed;

  WAKESLEEP_INLINE Strided<const T> tile(const Part& of) const {
    return is_packed ? Strided<const T>{a.data + of.first * K, 1, of.count} : a.from(of.first, 0);
  }
};

// Computes the columns of y that belong to a panel. A tile that is wider than y goes through `whole`, because masks in
// the loop above would need registers.
template <typename V, int vectors, typename T>
WAKESLEEP_INLINE void multiply_panel(const Block<T>& block, const T* panel, const Strided<T>& y, int64_t columns,
                                     bool adds) {
  constexpr int64_t width = vectors * V::width;
  for (int64_t t = 0; t < Part::number(block.M, kTileRows); ++t) {
    const Part part = Part::of(block.M, kTileRows, t);
    alignas(64) T whole[kTileRows * width];
    const Strided<T> tile = y.from(part.first, 0), to = columns == width ? tile : Strided<T>{whole, width, 1};
    if (columns < width && adds) {
      for (int64_t r = 0; r < part.count; ++r) {
        std::copy_n(tile.at(r, 0), columns, to.at(r, 0));
      }
    }
    for_at_most<kTileRows>(
        part.count, [&](auto rows) { multiply_tile<V, rows, vectors>(block.tile(part), panel, block.K, to, adds); });
    if (columns < width) {
      for (int64_t r = 0; r < part.count; ++r) {
        std::copy_n(to.at(r, 0), columns, tile.at(r, 0));
      }
    }
  }
}

// Applies y = f(y + bias) to columns that have just been computed.
template <typename T>
WAKESLEEP_INLINE void finish(Activation activation, const T* bias, int64_t rows, int64_t columns, const Strided<T>& y) {
  dispatch_activation(activation, [&](auto f) {
    for (int64_t r = 0; r < rows; ++r) {
      T* out = y.at(r, 0);
      for_lanes<T>(columns, [&](auto element, T product, T b) { element.store(out, f(product + b)); }, out, bias);
    }
  });
}

// The widest panel of any instruction set.
constexpr int64_t kStrip = kPanelWidth<float, 64>;

// Multiplies block `index` of the rows by columns first_column .. last_column - 1.
template <int bytes>
WAKESLEEP_INLINE void multiply_block(const PackedGemm& call, int64_t index, int64_t first_column, int64_t last_column) {
  using V = Vector<float, bytes>;
  constexpr int64_t width = kPanelWidth<float, bytes>;
  const auto a = strided<float>(call.a), b = strided<float>(call.b);
  const Strided<float> y = {call.y, call.N, 1};
  const Part rows = Part::of(call.M, kBlockRows, index);
  alignas(64) float packed_b[kDepth * width], packed_a[kBlockRows * kDepth + V::width];
  const int64_t depths = Part::number(call.K, kDepth);
  for (int64_t d = 0; d < depths; ++d) {
    const Part depth = Part::of(call.K, kDepth, d);
    Block<float> block = {a.from(rows.first, depth.first), rows.count, depth.count, a.column != 1};
    if (block.is_packed) {
      pack_tiles<V>(block.a, block.M, block.K, packed_a);
      block.a.data = packed_a;
    }
    for (int64_t n = first_column; n < last_column; n += width) {
      const int64_t columns = std::min(width, last_column - n);
      const Strided<float> to = y.from(rows.first, n);
      for_at_most<kTileVectors>((columns + V::width - 1) / V::width, [&](auto vectors) {
        for (int64_t v = 0; v < vectors; ++v) {
          pack_vectors<V>(b.from(depth.first, n + v * V::width), depth.count, columns - v * V::width,
                          packed_b + v * V::width, vectors * V::width);
        }
        multiply_panel<V, vectors>(block, packed_b, to, columns, call.adds || d > 0);
      });
      if (call.bias != nullptr && d == depths - 1) {
        finish(call.activation, call.bias + n, rows.count, columns, to);
      }
    }
  }
}

}  // namespace

// Threads divide the strips of columns of every block of rows.
void compute(const PackedGemm& call, Stream) {
  const int64_t blocks = Part::number(call.M, kBlockRows), strips = Part::number(call.N, kStrip);
  const int64_t grain = grain_of(call.M * call.K * call.N / (blocks * strips));
  vectorized_parallel_for(blocks * strips, grain, [&](auto bytes, int64_t begin, int64_t end) {
    for (int64_t index = begin / strips; index * strips < end; ++index) {
      const int64_t first = std::max<int64_t>(0, begin - index * strips), last = std::min(strips, end - index * strips);
      multiply_block<bytes>(call, index, first * kStrip, std::min(call.N, last * kStrip));
    }
  });
}

}  // namespace wakesleep::cpu
