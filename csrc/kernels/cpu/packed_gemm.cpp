// A GEMM of the BLIS kind. A panel of b, a few columns that fit in a register tile, is packed into the L1 cache and
// multiplied by a block of a, which stays in the L2 cache. Packing makes the three products of a layer alike: forward,
// the gradient of h and the gradient of weight differ only in the strides of the operands.
//
// The sum of an element runs over k in an order that depends on K alone. So the result does not depend on the other
// rows, nor on the number of threads.
#include "packing.h"

namespace wakesleep::cpu {
namespace {

// A block of a has at most this many rows and columns. Its packed copy and a panel are on the stack, so they take
// 120 kB. We measured depths of 128 to 384 on a Zen 3, which make no difference.
constexpr int64_t kBlockRows = 34 * kTileRows, kDepth = 128;

template <typename T, int bytes>
constexpr int64_t kPanelWidth = kTileVectors * Vector<T, bytes>::width;

// ---- multiplying ---------------------------------------------------------------------------------------------------

// Computes y = a panel + from for a tile of y [rows, vectors]. `from` may be y, and its data null for zero.
template <typename V, int rows, int vectors, typename T>
WAKESLEEP_INLINE void multiply_tile(const Strided<const T>& a, const T* panel, int64_t K, const Strided<const T>& from,
                                    const Strided<T>& y) {
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
      V::store(y.at(r, v * V::width), from.data != nullptr ? V::load(from.at(r, v * V::width)) + sum[r][v] : sum[r][v]);
    }
  }
}

// The columns of b that are packed next. While a panel is multiplied, each tile prefetches its share of them, because a
// training step finds b in the L3 cache.
template <typename T>
struct Next {
  Strided<const T> b;
  int64_t K, columns;

  // Prefetches rows or columns first .. first + count - 1, whichever are contiguous.
  WAKESLEEP_INLINE void prefetch(int64_t first, int64_t count) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    const int64_t length = has_rows() ? columns : K;
    for (int64_t i = first; i < std::min(first + count, lines()); ++i) {
      const T* line = has_rows() ? b.at(i, 0) : b.at(0, i);
      for (int64_t at = 0; at < length; at += kLine) {
        __builtin_prefetch(line + at);
      }
    }
  }

  WAKESLEEP_INLINE bool has_rows() const { return b.column == 1; }
  WAKESLEEP_INLINE int64_t lines() const { return has_rows() ? K : columns; }
};

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

// Computes y = block panel + from, for the columns of a panel. A tile that is wider than y goes through `whole`,
// because masks in the loop above would need registers.
template <typename V, int vectors, typename T>
WAKESLEEP_INLINE void multiply_panel(const Block<T>& block, const T* panel, const Next<T>& next,
                                     const Strided<const T>& from, const Strided<T>& y, int64_t columns) {
  constexpr int64_t width = vectors * V::width;
  const Parts tiles(block.M, kTileRows);
  const int64_t share = (next.lines() + tiles.number - 1) / tiles.number;
  for (int64_t t = 0; t < tiles.number; ++t) {
    next.prefetch(t * share, share);
    const Part part = tiles[t];
    alignas(64) T whole[kTileRows * width];
    const Strided<T> tile = y.from(part.first, 0), to = columns == width ? tile : Strided<T>{whole, width, 1};
    Strided<const T> start = from.data == nullptr ? from : from.from(part.first, 0);
    if (columns < width && from.data != nullptr) {
      for (int64_t r = 0; r < part.count; ++r) {
        std::copy_n(start.at(r, 0), columns, to.at(r, 0));
      }
      start = {whole, width, 1};
    }
    for_at_most<kTileRows>(part.count, [&](auto rows) {
      run_apart<sizeof(typename V::Lanes)>(block.K, [a = block.tile(part), panel, start, to](auto, int64_t, int64_t K) {
        multiply_tile<V, decltype(rows)::value, vectors>(a, panel, K, start, to);
      });
    });
    if (columns < width) {
      for (int64_t r = 0; r < part.count; ++r) {
        std::copy_n(to.at(r, 0), columns, tile.at(r, 0));
      }
    }
  }
}

// Applies y = f(y) to columns that have just been computed.
template <int bytes, typename T>
WAKESLEEP_INLINE void finish(Activation activation, int64_t rows, int64_t columns, const Strided<T>& y) {
  dispatch_activation(activation, [&](auto f) {
    run_apart<bytes>(rows, [f, columns, y](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        T* out = y.at(r, 0);
        for_lanes<T>(columns, [&](auto element, T a) { element.store(out, f(a)); }, out);
      }
    });
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
  const Part rows = Parts(call.M, kBlockRows)[index];
  alignas(64) float packed_b[kDepth * width], packed_a[kBlockRows * kDepth + V::width];
  const Parts depths(call.K, kDepth);
  for (int64_t d = 0; d < depths.number; ++d) {
    const Part depth = depths[d];
    Block<float> block = {a.from(rows.first, depth.first), rows.count, depth.count, a.column != 1};
    if (block.is_packed) {
      pack_tiles<V>(block.a, block.M, block.K, packed_a);
      block.a.data = packed_a;
    }
    for (int64_t n = first_column; n < last_column; n += width) {
      const int64_t columns = std::min(width, last_column - n);
      const Strided<float> to = y.from(rows.first, n);
      const bool is_last = n + width >= last_column;
      const Part next_depth = is_last ? depths[std::min(d + 1, depths.number - 1)] : depth;
      const int64_t next_n = is_last ? first_column : n + width;
      const Next<float> next = {b.from(next_depth.first, next_n), next_depth.count,
                                std::min(width, last_column - next_n)};
      for_at_most<kTileVectors>((columns + V::width - 1) / V::width, [&](auto vectors) {
        for (int64_t v = 0; v < vectors; ++v) {
          pack_vectors<V>(b.from(depth.first, n + v * V::width), depth.count, columns - v * V::width,
                          packed_b + v * V::width, vectors * V::width);
        }
        const Strided<const float> sum_so_far = {to.data, to.row, 1}, bias = {call.bias + n, 0, 1}, zero = {};
        multiply_panel<V, vectors>(block, packed_b, next,
                                   call.adds || d > 0     ? sum_so_far
                                   : call.bias != nullptr ? bias
                                                          : zero,
                                   to, columns);
      });
      if (call.activation != Activation::identity && d == depths.number - 1) {
        finish<bytes>(call.activation, rows.count, columns, to);
      }
    }
  }
}

}  // namespace

// Threads divide the strips of columns of every block of rows.
void compute(const PackedGemm& call, Stream) {
  const int64_t blocks = Parts(call.M, kBlockRows).number, strips = Parts(call.N, kStrip).number;
  const int64_t grain = grain_of(call.M * call.K * call.N / (blocks * strips));
  vectorized_parallel_for(blocks * strips, grain, [&](auto bytes, int64_t begin, int64_t end) {
    for (int64_t index = begin / strips; index * strips < end; ++index) {
      const int64_t first = std::max<int64_t>(0, begin - index * strips), last = std::min(strips, end - index * strips);
      multiply_block<bytes>(call, index, first * kStrip, std::min(call.N, last * kStrip));
    }
  });
}

}  // namespace wakesleep::cpu
