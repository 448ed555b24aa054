// Vectorises the CPU kernels. Plain loops are compiled once per instruction set, and the version to run is chosen at
// run time.
//
// vectorized_parallel_for(n, grain, body) runs body(begin, end) on several threads, in a function compiled for AVX-512,
// AVX2 or the baseline. The attribute `flatten` inlines all of body into each of these functions. So body is written
// once, as plain loops over the lanes of a 64-byte vector, which the compiler vectorises. A body that keeps vectors in
// registers has the signature body(Bytes<n>{}, begin, end), where n is the size of a vector. Such a body needs AVX2 or
// AVX-512. The host code provides the threads and chooses the instruction set (threads.h).
//
// Reductions keep one accumulator per lane of a 64-byte vector, regardless of the hardware's vector width. They add the
// accumulators in a fixed order. The compiler is not allowed to fuse multiply-adds. So every instruction set and every
// thread count returns the same bits.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "../elementary.h"
#include "threads.h"

namespace wakesleep::cpu {

template <int n>
using Bytes = std::integral_constant<int, n>;

// Calls body with or without the size of a vector, depending on the signature of body.
template <int bytes, typename Body>
WAKESLEEP_INLINE void run(const Body& body, int64_t begin, int64_t end) {
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

// Runs body on 0 .. count - 1 in a function of its own, where the compiler allocates registers for this body alone. The
// caller runs in vectorized_parallel_for.
template <int bytes, typename Body>
WAKESLEEP_INLINE void run_apart(int64_t count, const Body& body) {
  if constexpr (bytes == 64) {
    run_avx512(body, 0, count);
  } else {
    run_avx2(body, 0, count);
  }
}
#endif

template <typename Body>
__attribute__((flatten, noinline)) void run_baseline(const Body& body, int64_t begin, int64_t end) {
  if constexpr (std::is_invocable_v<Body, int64_t, int64_t>) {
    body(begin, end);
  } else {
    std::abort();  // the caller has not checked instruction_set()
  }
}

template <typename Body>
void vectorized_parallel_for(int64_t count, int64_t grain, const Body& body) {
  const InstructionSet set = instruction_set();
  parallel_for(count, grain, [&](int64_t begin, int64_t end) {
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

  WAKESLEEP_INLINE explicit Lanes(T value) { fill(value); }

  WAKESLEEP_INLINE void fill(T value) {
    for (int l = 0; l < width; ++l) {
      lane[l] = value;
    }
  }

  WAKESLEEP_INLINE void operator+=(const Lanes& other) {
#pragma omp simd
    for (int l = 0; l < width; ++l) {
      lane[l] += other.lane[l];
    }
  }

  WAKESLEEP_INLINE T sum() const { return pairwise_sum<width>(lane); }

 private:
  // Adds the first half and the second half as vectors, then repeats this with the result.
  template <int count>
  static WAKESLEEP_INLINE T pairwise_sum(const T* value) {
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

  WAKESLEEP_INLINE Element after(int64_t columns) const { return {columns + index, lane, holds}; }

  template <typename T>
  WAKESLEEP_INLINE void store(T* to, T value) const {
    if (holds) {
      to[index] = value;
    }
  }

  template <typename T>
  WAKESLEEP_INLINE void add(T* to, T value) const {
    if (holds) {
      to[index] += value;
    }
  }

  template <bool adds, typename T>
  WAKESLEEP_INLINE void put(T* to, T value) const {
    adds ? add(to, value) : store(to, value);
  }

  template <typename T>
  WAKESLEEP_INLINE void add(Lanes<T>& sum, T value) const {
    sum.lane[lane] += holds ? value : T(0);
  }

  template <typename T>
  WAKESLEEP_INLINE void multiply(Lanes<T>& product, T value) const {
    product.lane[lane] *= holds ? value : T(1);
  }
};

// The last elements of an operand, padded with zeros to a full vector. Without the zeros, a masked load leaves old
// register contents in the other lanes. If such a value happens to be subnormal, arithmetic on it takes a hundred
// cycles.
template <typename T, int width>
struct RaggedEnd {
  T lane[width];

  WAKESLEEP_INLINE RaggedEnd(const T* from, int64_t count) {
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
WAKESLEEP_INLINE void for_lanes(int64_t count, const Body& body, const Operands*... operand) {
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

}  // namespace wakesleep::cpu
