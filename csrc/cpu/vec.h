// Vectorises the CPU kernels. Plain loops are compiled once per instruction set, and the version to run is chosen at
// run time.
//
// vectorized_parallel_for(n, grain, body) runs body(begin, end) under at::parallel_for, in a function compiled for
// AVX-512, AVX2 or the baseline. The attribute `flatten` inlines all of body into each of these functions. So body is
// written once, as plain loops over the lanes of a 64-byte vector, which the compiler vectorises. A body that keeps
// vectors in registers has the signature body(Bytes<n>{}, begin, end), where n is the size of a vector. Such a body
// needs AVX2 or AVX-512. ATen chooses the instruction set, and ATEN_CPU_CAPABILITY overrides the choice.
//
// Reductions keep one accumulator per lane of a 64-byte vector, regardless of the hardware's vector width. They add the
// accumulators in a fixed order. The compiler is not allowed to fuse multiply-adds. So every instruction set and every
// thread count returns the same bits.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <string_view>

#include "../geometry.h"

namespace wakesleep::cpu {

enum class InstructionSet { baseline, avx2, avx512 };

inline InstructionSet instruction_set() {
  static const InstructionSet chosen = [] {
    const std::string capability = at::get_cpu_capability();
    if (capability.rfind("AVX512", 0) == 0) {
      return InstructionSet::avx512;
    }
    return capability == "AVX2" ? InstructionSet::avx2 : InstructionSet::baseline;
  }();
  return chosen;
}

template <int n>
using Bytes = std::integral_constant<int, n>;

// Calls body with or without the size of a vector, depending on the signature of body.
template <int bytes, typename Body>
C10_ALWAYS_INLINE void run(const Body& body, int64_t begin, int64_t end) {
  if constexpr (std::is_invocable_v<Body, Bytes<bytes>, int64_t, int64_t>) {
    body(Bytes<bytes>{}, begin, end);
  } else {
    body(begin, end);
  }
}

#if defined(__x86_64__)
#define WAKESLEEP_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512"
#define WAKESLEEP_AVX2 "avx2,fma,f16c"
#define WAKESLEEP_COMPILED_FOR(features) __attribute__((target(features), flatten, noinline))

template <typename Body>
WAKESLEEP_COMPILED_FOR(WAKESLEEP_AVX512)
void run_avx512(const Body& body, int64_t begin, int64_t end) {
  run<64>(body, begin, end);
}

template <typename Body>
WAKESLEEP_COMPILED_FOR(WAKESLEEP_AVX2)
void run_avx2(const Body& body, int64_t begin, int64_t end) {
  run<32>(body, begin, end);
}
#endif

template <typename Body>
__attribute__((flatten, noinline)) void run_baseline(const Body& body, int64_t begin, int64_t end) {
  if constexpr (std::is_invocable_v<Body, int64_t, int64_t>) {
    body(begin, end);
  } else {
    TORCH_INTERNAL_ASSERT(false, "this body needs AVX; check instruction_set() before the call");
  }
}

template <typename Body>
void vectorized_parallel_for(int64_t count, int64_t grain, const Body& body) {
  const InstructionSet set = instruction_set();
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
#if defined(__x86_64__)
    if (set == InstructionSet::avx512) {
      return run_avx512(body, begin, end);
    }
    if (set == InstructionSet::avx2) {
      return run_avx2(body, begin, end);
    }
#endif
    run_baseline(body, begin, end);
  });
}

// Returns the smallest number of rows that is worth a separate thread.
inline int64_t grain_rows(int64_t row_elements) {
  constexpr int64_t kGrainElements = 16384;
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, row_elements));
}

// One value per lane of a 64-byte vector.
template <typename T>
struct Lanes {
  static constexpr int width = 64 / sizeof(T);
  T lane[width];

  C10_ALWAYS_INLINE explicit Lanes(T value) { fill(value); }

  C10_ALWAYS_INLINE void fill(T value) {
    for (int l = 0; l < width; ++l) {
      lane[l] = value;
    }
  }

  C10_ALWAYS_INLINE void operator+=(const Lanes& other) {
#pragma omp simd
    for (int l = 0; l < width; ++l) {
      lane[l] += other.lane[l];
    }
  }

  C10_ALWAYS_INLINE T sum() const { return pairwise_sum<width>(lane); }

 private:
  // Adds the first half and the second half as vectors, then repeats this with the result.
  template <int count>
  static C10_ALWAYS_INLINE T pairwise_sum(const T* value) {
    if constexpr (count == 2) {
      return value[0] + value[1];
    } else {
      typedef T Half __attribute__((vector_size(sizeof(T) * count / 2)));  // `using` would drop the attribute
      static_assert(sizeof(Half) == sizeof(T) * count / 2);
      Half low, high;
      std::memcpy(&low, value, sizeof(Half));
      std::memcpy(&high, value + count / 2, sizeof(Half));
      low += high;
      T half[count / 2];
      std::memcpy(half, &low, sizeof(Half));
      return pairwise_sum<count / 2>(half);
    }
  }
};

// The position that for_lanes passes to its body: the index of an element and its lane. The last vector is processed
// with all its lanes, and `holds` is false in lanes beyond the last element.
template <typename Holds>
struct Element {
  int64_t index;
  int lane;
  Holds holds;

  C10_ALWAYS_INLINE Element after(int64_t columns) const { return {columns + index, lane, holds}; }

  template <typename T>
  C10_ALWAYS_INLINE void store(T* to, T value) const {
    if (holds) {
      to[index] = value;
    }
  }

  template <typename T>
  C10_ALWAYS_INLINE void add(T* to, T value) const {
    if (holds) {
      to[index] += value;
    }
  }

  template <bool adds, typename T>
  C10_ALWAYS_INLINE void put(T* to, T value) const {
    adds ? add(to, value) : store(to, value);
  }

  template <typename T>
  C10_ALWAYS_INLINE void add(Lanes<T>& sum, T value) const {
    sum.lane[lane] += holds ? value : T(0);
  }

  template <typename T>
  C10_ALWAYS_INLINE void multiply(Lanes<T>& product, T value) const {
    product.lane[lane] *= holds ? value : T(1);
  }
};

// The last elements of an operand, padded with zeros to a full vector. Without the zeros, a masked load leaves old
// register contents in the other lanes. If such a value happens to be subnormal, arithmetic on it takes a hundred
// cycles.
template <typename T, int width>
struct RaggedEnd {
  T lane[width];

  C10_ALWAYS_INLINE RaggedEnd(const T* from, int64_t count) {
#pragma omp simd
    for (int l = 0; l < width; ++l) {
      lane[l] = l < count ? from[l] : T(0);
    }
  }
};

// Calls body(element, operand values...) for `count` elements. Each iteration processes as many elements as a 64-byte
// vector of T holds. The elements that remain are processed as one masked vector, not in a scalar loop. So one
// remaining element takes as long as fifteen remaining elements.
template <typename T, typename Body, typename... Operands>
C10_ALWAYS_INLINE void for_lanes(int64_t count, const Body& body, const Operands*... operand) {
  constexpr int width = Lanes<T>::width;
  int64_t i = 0;
  for (; i + width <= count; i += width) {
#pragma omp simd
    for (int l = 0; l < width; ++l) {
      body(Element<std::true_type>{i + l, l, {}}, operand[i + l]...);
    }
  }
  const auto finish = [&](const RaggedEnd<Operands, width>&... end) {
#pragma omp simd
    for (int l = 0; l < width; ++l) {
      body(Element<bool>{i + l, l, i + l < count}, end.lane[l]...);
    }
  };
  if (i < count) {
    finish({operand + i, count - i}...);
  }
}

// Rows are processed in tiles of at most this many elements, which stay in the L1 cache.
constexpr int64_t kTile = 1024;

// Elements in the compute type. Elements stored in this type are used in place, and all others are converted into the
// tile. A loop over a single type uses full vectors. In a loop that also reads narrower types, the compiled code
// processes at most a quarter as many elements per iteration.
template <typename compute_t>
class Tile {
 public:
  C10_ALWAYS_INLINE Tile() {}  // leaves value_ uninitialised; a defaulted constructor would zero it

  template <typename scalar_t>
  C10_ALWAYS_INLINE const compute_t* read(const scalar_t* from, int64_t count) {
    if constexpr (std::is_same_v<scalar_t, compute_t>) {
      return from;
    } else {
      for_lanes<scalar_t>(
          count, [&](auto element, scalar_t value) { element.store(value_, static_cast<compute_t>(value)); }, from);
      return value_;
    }
  }

  C10_ALWAYS_INLINE const compute_t* sum_of(const compute_t* a, const compute_t* b, int64_t count) {
    for_lanes<compute_t>(
        count, [&](auto element, compute_t left, compute_t right) { element.store(value_, left + right); }, a, b);
    return value_;
  }

  // Returns the address where the caller should write the values for `to`. If this address is not `to` itself, store()
  // then converts the values to scalar_t and copies them to `to`.
  template <typename scalar_t>
  C10_ALWAYS_INLINE compute_t* place_for(scalar_t* to) {
    if constexpr (std::is_same_v<scalar_t, compute_t>) {
      return to;
    } else {
      return value_;
    }
  }

  template <typename scalar_t>
  C10_ALWAYS_INLINE void store(scalar_t* to, int64_t count) const {
    if constexpr (!std::is_same_v<scalar_t, compute_t>) {
      for_lanes<scalar_t>(
          count, [&](auto element, compute_t value) { element.store(to, static_cast<scalar_t>(value)); }, value_);
    }
  }

 private:
  alignas(64) compute_t value_[kTile];
};

// Calls body(column, columns) for every tile of a row.
template <typename Body>
C10_ALWAYS_INLINE void for_tiles(int64_t width, const Body& body) {
  for (int64_t column = 0; column < width; column += kTile) {
    body(column, std::min(kTile, width - column));
  }
}

// Returns the sum of term(operands...) for each lane.
template <typename compute_t, typename Term, typename... Operands>
C10_ALWAYS_INLINE Lanes<compute_t> lane_sums(int64_t count, const Term& term, const Operands*... operand) {
  Lanes<compute_t> sum(0);
  for_lanes<compute_t>(count, [&](auto element, Operands... value) { element.add(sum, term(value...)); }, operand...);
  return sum;
}

// Returns the sum of term(operands...) over a row, with the operands converted to compute_t.
template <typename compute_t, typename Term, typename... Operands>
C10_ALWAYS_INLINE compute_t sum_over_row(int64_t width, const Term& term, const Operands*... row) {
  Lanes<compute_t> sum(0);
  for (int64_t column = 0; column < width; column += kTile) {
    const int64_t columns = std::min(kTile, width - column);
    sum += lane_sums<compute_t>(columns, term, Tile<compute_t>().read(row + column, columns)...);
  }
  return sum.sum();
}

// Calls body(piece, index, column, columns) for every tile of every piece. A sum over inner rows is split into pieces.
template <int operands, typename Body>
void for_inner_pieces(const RowGroups<operands>& rows, int64_t width, const Body& body) {
  const int64_t count = inner_pieces(rows.inner.rows) * rows.outer.rows;
  vectorized_parallel_for(
      count, grain_rows(width * std::min(rows.inner.rows, kPieceRows)), [&](int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index) {
          const auto piece = inner_piece(rows, index);
          for_tiles(width, [&](int64_t column, int64_t columns) { body(piece, index, column, columns); });
        }
      });
}

// Calls body(layer, first row, rows) for every tile of every layer. A tile is several narrow rows or one wide row.
template <typename Body>
void for_row_tiles(int64_t layers, int64_t rows, int64_t width, const Body& body) {
  const int64_t rows_at_once = std::max<int64_t>(1, kTile / std::max<int64_t>(1, width));
  const int64_t tiles = (rows + rows_at_once - 1) / rows_at_once;
  vectorized_parallel_for(layers * tiles, grain_rows(4 * rows_at_once * width), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t row = index % tiles * rows_at_once;
      body(index / tiles, row, std::min(rows_at_once, rows - row));
    }
  });
}

}  // namespace wakesleep::cpu
