// Loads and stores several elements of a row at once.
//
// A row is divided into spans. Each thread loads a span of every operand in words of up to 16 bytes. The host chooses
// the longest word that divides the first address, the strides and the width of all operands (dispatch_word). So every
// word is aligned, and lies either within the row or outside it. If the host does not choose, a Span finds the
// alignment itself.
#pragma once

#include <array>

#include "../rows.h"
#include "launch.cuh"

namespace wakesleep::cuda {

// A register copy of n consecutive elements.
template <typename T, int n>
struct Packet {
  T value[n];
};

template <typename T>
constexpr int kPacket = 16 / sizeof(T);

// The position of a packet in a row: the n columns that start at `column`. Elements `first` to `last` - 1 of the packet
// are within the row. If `aligned` is true, all n elements are within the row, and the compiler removes the bounds
// checks.
template <int n, bool aligned>
struct Span {
  static constexpr int size = n;
  int64_t column;
  int first, last;

  __device__ bool holds(int i) const { return aligned || (i >= first && i < last); }
  __device__ bool whole() const { return aligned || (first == 0 && last == n); }
};

// A span whose alignment the host has established: n columns from `column` on, in words of `word` elements. If `masked`
// is false, all of them are within the row. Otherwise, elements `first` to `last` - 1 are, which are whole words.
template <int n, int word, bool masked>
struct WordSpan {
  static_assert(n % word == 0);
  static constexpr int size = n;
  int64_t column;
  int first, last;

  __device__ bool holds(int i) const { return !masked || (i >= first && i < last); }
};

// A power of two divides several numbers if it divides the union of their bits. The functions below return such unions:
// of an operand's strides, or of its first address and its strides. The caller unites the operands and the width.
template <int operands>
uint64_t strides(const RowMap<operands>& rows, int operand) {
  uint64_t all = 0;
  for (int d = 0; d < rows.dims; ++d) {
    all |= static_cast<uint64_t>(rows.stride[operand][d]);
  }
  return all;
}

template <typename T>
uint64_t places(const T* first) {
  return reinterpret_cast<uintptr_t>(first) / sizeof(T);
}

template <typename T, int operands>
uint64_t places(const T* first, const RowMap<operands>& rows, int operand) {
  return places(first) | strides(rows, operand);
}

template <typename T, int operands>
uint64_t places(const T* first, const RowGroups<operands>& rows, int operand) {
  return places(first, rows.outer, operand) | strides(rows.inner, operand);
}

// Calls body(std::integral_constant<int, word>{}) for the longest word of up to n elements that divides the places.
template <int n, typename Body>
void dispatch_word(uint64_t places, const Body& body) {
  if constexpr (n == 1) {
    body(std::integral_constant<int, 1>{});
  } else {
    places % n == 0 ? body(std::integral_constant<int, n>{}) : dispatch_word<n / 2>(places, body);
  }
}

template <int n, typename T>
__device__ bool on_boundary(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % (sizeof(T) * n) == 0;
}

// Returns true if all operands of a row begin and end at addresses aligned to n elements.
template <int n, typename... T>
__device__ bool aligned(int64_t width, const T*... rows) {
  return width % n == 0 && (on_boundary<n>(rows) && ...);
}

// The word types with which a packet is loaded and stored. If packets were loaded and stored element by element, the
// aligned and the unaligned path would be identical, and the compiler would merge them.
template <size_t bytes>
struct WideWord : Type<uint4> {};
template <>
struct WideWord<1> : Type<unsigned char> {};
template <>
struct WideWord<2> : Type<unsigned short> {};
template <>
struct WideWord<4> : Type<unsigned> {};
template <>
struct WideWord<8> : Type<uint2> {};

template <typename T, int n>
using WideWords = std::array<typename WideWord<sizeof(T) * n>::type, sizeof(T) * n <= 16 ? 1 : sizeof(T) * n / 16>;

// How to load from memory. ReadOnly uses the read-only cache, for memory that the kernel only reads. Written is for
// memory that the kernel also writes.
struct ReadOnly {
  template <typename Word>
  static __device__ Word load(const Word* from) {
    return __ldg(from);
  }
};
struct Written {
  template <typename Word>
  static __device__ Word load(const Word* from) {
    return *from;
  }
};

template <typename compute_t, typename T, int n>
__device__ Packet<compute_t, n> convert(const Packet<T, n>& packet) {
  Packet<compute_t, n> values;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    values.value[i] = static_cast<compute_t>(packet.value[i]);
  }
  return values;
}

// Loads the elements of `row` that are in the span, and sets all other elements to zero.
template <typename compute_t, typename Access = ReadOnly, int n, int word, bool masked, typename T>
__device__ Packet<compute_t, n> load(WordSpan<n, word, masked> span, const T* row) {
  using Word = typename WideWords<T, word>::value_type;
  constexpr int elements = sizeof(Word) / sizeof(T);
  const auto* from = reinterpret_cast<const Word*>(row + span.column);
  std::array<Word, n / elements> words = {};
#pragma unroll
  for (int w = 0; w < n / elements; ++w) {
    if (span.holds(w * elements)) {
      words[w] = Access::load(from + w);
    }
  }
  return convert<compute_t>(wakesleep::bit_cast<Packet<T, n>>(words));
}

// Loads the elements of `row` that are in the span, and sets all other elements to zero. The conversion to compute_t
// comes after the branches join. Inside the branches, the conversion would make each load complete before the next load
// is issued.
template <typename compute_t, typename Access = ReadOnly, int n, bool aligned, typename T>
__device__ Packet<compute_t, n> load(Span<n, aligned> span, const T* row) {
  WideWords<T, n> words;
  if (aligned || (span.whole() && on_boundary<n>(row + span.column))) {
    const auto* from = reinterpret_cast<typename WideWords<T, n>::const_pointer>(row + span.column);
#pragma unroll
    for (size_t w = 0; w < words.size(); ++w) {
      words[w] = Access::load(from + w);
    }
  } else {
    Packet<T, n> single;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      single.value[i] = span.holds(i) ? row[span.column + i] : T(0);
    }
    words = wakesleep::bit_cast<WideWords<T, n>>(single);
  }
  return convert<compute_t>(wakesleep::bit_cast<Packet<T, n>>(words));
}

template <typename T, int n, int word, bool masked, typename compute_t>
__device__ void store(WordSpan<n, word, masked> span, const Packet<compute_t, n>& values, T* row) {
  using Word = typename WideWords<T, word>::value_type;
  constexpr int elements = sizeof(Word) / sizeof(T);
  auto* to = reinterpret_cast<Word*>(row + span.column);
  const auto words = wakesleep::bit_cast<std::array<Word, n / elements>>(convert<T>(values));
#pragma unroll
  for (int w = 0; w < n / elements; ++w) {
    if (span.holds(w * elements)) {
      __stwb(to + w, words[w]);
    }
  }
}

template <typename T, int n, bool aligned, typename compute_t>
__device__ void store(Span<n, aligned> span, const Packet<compute_t, n>& values, T* row) {
  const auto packet = convert<T>(values);
  if (aligned || (span.whole() && on_boundary<n>(row + span.column))) {
    auto* to = reinterpret_cast<typename WideWords<T, n>::pointer>(row + span.column);
    const auto words = wakesleep::bit_cast<WideWords<T, n>>(packet);
#pragma unroll
    for (size_t w = 0; w < words.size(); ++w) {
      __stwb(to + w, words[w]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (span.holds(i)) {
        row[span.column + i] = packet.value[i];
      }
    }
  }
}

// Returns the number of elements from the last address aligned to n elements to the start of the row.
template <int n, typename T>
__device__ int past_boundary(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % n);
}

}  // namespace wakesleep::cuda
