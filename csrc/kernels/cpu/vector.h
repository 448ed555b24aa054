// Vector registers as values, for kernels that keep their operands in registers.
#pragma once

#include <cmath>
#include <utility>

#include "vec.h"

namespace wakesleep::cpu {

// Unrolls loops over arrays, so that the arrays stay in registers.
#define WAKESLEEP_UNROLL _Pragma("GCC unroll 16")

// Operations on a vector register of `bytes` bytes.
template <typename T, int bytes>
struct Vector {
  static constexpr int width = bytes / static_cast<int>(sizeof(T));
  typedef T Lanes __attribute__((vector_size(bytes)));
  typedef T Stored __attribute__((vector_size(bytes), aligned(alignof(T)), may_alias));

  static WAKESLEEP_INLINE Lanes load(const T* from) { return *reinterpret_cast<const Stored*>(from); }
  static WAKESLEEP_INLINE void store(T* to, Lanes lanes) { *reinterpret_cast<Stored*>(to) = lanes; }

  // Loads the first `count` lanes and sets the other lanes to zero.
  static WAKESLEEP_INLINE Lanes load(const T* from, int64_t count) {
    return load(RaggedEnd<T, width>(from, count).lane);
  }

  static WAKESLEEP_INLINE void store(T* to, Lanes lanes, int64_t count) {
    T lane[width];
    store(lane, lanes);
#pragma omp simd
    for (int l = 0; l < width; ++l) {
      if (l < count) {
        to[l] = lane[l];
      }
    }
  }

  // Loads the elements of `vectors` vectors. If is_ragged is true, the last vector has only `last` elements.
  template <bool is_ragged, int vectors>
  static WAKESLEEP_INLINE void load(Lanes (&lanes)[vectors], const T* from, int64_t last) {
    constexpr int full = vectors - is_ragged;
    WAKESLEEP_UNROLL
    for (int v = 0; v < full; ++v) {
      lanes[v] = load(from + v * width);
    }
    if constexpr (is_ragged) {
      lanes[full] = load(from + full * width, last);
    }
  }

  template <bool is_ragged, int vectors>
  static WAKESLEEP_INLINE void store(T* to, const Lanes (&lanes)[vectors], int64_t last) {
    constexpr int full = vectors - is_ragged;
    WAKESLEEP_UNROLL
    for (int v = 0; v < full; ++v) {
      store(to + v * width, lanes[v]);
    }
    if constexpr (is_ragged) {
      store(to + full * width, lanes[full], last);
    }
  }

  static WAKESLEEP_INLINE Lanes all(T value) {
    Lanes lanes;
    WAKESLEEP_UNROLL
    for (int l = 0; l < width; ++l) {
      lanes[l] = value;
    }
    return lanes;
  }

  // Returns a b + c, rounded once (a fused multiply-add). Fusing halves the number of arithmetic instructions. It also
  // changes the last bits of a GEMM, so these bits may differ between instruction sets.
  static WAKESLEEP_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
    WAKESLEEP_UNROLL
    for (int l = 0; l < width; ++l) {
      c[l] = std::fma(a[l], b[l], c[l]);
    }
    return c;
  }

  // Returns elements of a (indices 0 .. width - 1) and of b (indices width .. 2 width - 1).
  template <int... index>
  static WAKESLEEP_INLINE Lanes shuffle(Lanes a, Lanes b) {
#if __has_builtin(__builtin_shufflevector)
    return __builtin_shufflevector(a, b, index...);
#else
    using Index = decltype(a < b);
    return __builtin_shuffle(a, b, Index{index...});
#endif
  }

  // The number of elements in 16 bytes, the part of a register within which moving an element is cheap.
  static constexpr int group = 16 / static_cast<int>(sizeof(T));

  // Loads group i from at(i).
  template <int first = 0, typename At>
  static WAKESLEEP_INLINE Lanes gather(const At& at) {
    if constexpr (width == group) {
      return load(at(first));
    } else {
      using Half = Vector<T, bytes / 2>;
      return joined(Half::template gather<first>(at), Half::template gather<first + width / 2 / group>(at),
                    std::make_integer_sequence<int, width>());
    }
  }

  // Sums the lanes of each vector in a group, and writes one sum per vector. Each step adds neighbouring lanes in all
  // vectors of the group.
  static WAKESLEEP_INLINE void sums(const Lanes (&of)[group], T* to) {
    T lane[width];
    store(lane, tree<group>(of));
    fold<width>(lane, to);
  }

 private:
  template <typename Half, int... index>
  static WAKESLEEP_INLINE Lanes joined(Half low, Half high, std::integer_sequence<int, index...>) {
#if __has_builtin(__builtin_shufflevector)
    return __builtin_shufflevector(low, high, index...);
#else
    return Lanes{(index < width / 2 ? low[index % (width / 2)] : high[index % (width / 2)])...};
#endif
  }

  // Each 16-byte block of the result holds partial sums for all `count` vectors, and each sum covers the same 16-byte
  // block of its vector.
  template <int count>
  static WAKESLEEP_INLINE Lanes tree(const Lanes* of) {
    if constexpr (count == 1) {
      return *of;
    } else {
      return of_neighbours(tree<count / 2>(of), tree<count / 2>(of + count / 2),
                           std::make_integer_sequence<int, width>());
    }
  }

  template <int... lane>
  static WAKESLEEP_INLINE Lanes of_neighbours(Lanes a, Lanes b, std::integer_sequence<int, lane...>) {
    return shuffle<pair(lane)...>(a, b) + shuffle<(pair(lane) + 1)...>(a, b);
  }

  // Returns the index of the first of the two neighbouring lanes whose sum goes to `lane`. The indices of the second
  // vector start at `width`. Each vector provides half of every 16-byte block.
  static constexpr int pair(int lane) {
    const int place = lane % group, half = group / 2;
    return lane - place + 2 * (place % half) + (place < half ? 0 : width);
  }

  // Adds all 16-byte blocks and writes the sum to `to`.
  template <int lanes>
  static WAKESLEEP_INLINE void fold(const T* from, T* to) {
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

}  // namespace wakesleep::cpu
