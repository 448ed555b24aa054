// Assigns rows to threads, and loads, reduces and stores them.
//
// A team of threads works on a row. If the row is reduced, the team size depends only on the row's width, so the sum
// does not depend on the batch. Reductions use warp shuffles in a fixed order.
//
// A row is divided into spans of 16 bytes that are aligned in the row's first operand. Only the first and the last span
// can be partial, so an odd width costs little. An operand that is not aligned at these positions is read element by
// element.
#pragma once

#include <ATen/OpMathType.h>

#include <array>

#include "../dispatch.h"
#include "../geometry.h"
#include "../philox.h"
#include "launch.cuh"

namespace wakesleep::cuda {

template <int threads>
struct Team {
  static_assert(threads <= 32 || threads == kBlockThreads);
  static constexpr int size = threads;
  static constexpr int per_block = kBlockThreads / threads;

  static __device__ int rank() { return threadIdx.x % threads; }
  static __device__ int64_t first() { return int64_t(blockIdx.x) * per_block + threadIdx.x / threads; }
  static __device__ int64_t count() { return int64_t(gridDim.x) * per_block; }

  // Returns the sum over the team to every thread.
  template <typename T>
  static __device__ T sum(T value) {
    constexpr int lanes = threads < 32 ? threads : 32;
    const unsigned members = threads < 32 ? ((1u << lanes) - 1) << (threadIdx.x % 32 / lanes * lanes) : 0xffffffffu;
#pragma unroll
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      value += __shfl_xor_sync(members, value, distance);
    }
    if constexpr (threads > 32) {
      constexpr int warps = threads / 32;
      __shared__ T partial[warps];
      __syncthreads();  // other threads may still read the sums of the previous row
      if (threadIdx.x % 32 == 0) {
        partial[threadIdx.x / 32] = value;
      }
      __syncthreads();
      value = 0;
#pragma unroll
      for (int warp = 0; warp < warps; ++warp) {
        value += partial[warp];
      }
    }
    return value;
  }
};

// The launch bounds allow 128 registers per thread and at least two blocks per multiprocessor. Without the bounds, the
// compiler spills registers to fit one more block.
template <int threads, typename RowBody>
__global__ void __launch_bounds__(kBlockThreads, 2) row_kernel(const RowBody body, int64_t rows) {
  for (int64_t row = Team<threads>::first(); row < rows; row += Team<threads>::count()) {
    body(Team<threads>{}, row);
  }
}

template <int threads, typename RowBody>
void launch_teams(Team<threads>, int64_t rows, const RowBody& body) {
  constexpr int per_block = Team<threads>::per_block;
  launch(row_kernel<threads, RowBody>, (rows + per_block - 1) / per_block, kBlockThreads, body, rows);
}

// Calls body(team, row) for every row. Each thread processes a few spans of n elements, which amortises the work done
// once per row.
template <int n = 4, typename RowBody>
void launch_rows(int64_t rows, int64_t width, const RowBody& body) {
  const int64_t spans = (width + n - 1) / n;
  if (spans <= 16) {
    launch_teams(Team<8>{}, rows, body);
  } else if (spans <= 128) {
    launch_teams(Team<16>{}, rows, body);
  } else if (spans <= 768) {
    launch_teams(Team<32>{}, rows, body);
  } else {
    launch_teams(Team<kBlockThreads>{}, rows, body);
  }
}

// Like launch_rows, but for kernels that do not sum along a row. Their results do not depend on the size of the team.
// If there are too few rows to keep a GPU busy, the function uses one block per row, which is faster than smaller
// teams.
template <int n, typename RowBody>
void launch_free_rows(int64_t rows, int64_t width, const RowBody& body) {
  constexpr int64_t few = 1024;
  if (rows <= few && width > 32 * n) {
    launch_teams(Team<kBlockThreads>{}, rows, body);
  } else {
    launch_rows<n>(rows, width, body);
  }
}

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
  const auto packet = wakesleep::bit_cast<Packet<T, n>>(words);
  Packet<compute_t, n> values;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    values.value[i] = static_cast<compute_t>(packet.value[i]);
  }
  return values;
}

template <typename T, int n, bool aligned, typename compute_t>
__device__ void store(Span<n, aligned> span, const Packet<compute_t, n>& values, T* row) {
  Packet<T, n> packet;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    packet.value[i] = static_cast<T>(values.value[i]);
  }
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

// Calls body(span) for every span of a row. The threads of the team divide the spans. The row begins `past` elements
// after an aligned address.
template <int n, int threads, typename Body>
__device__ void for_spans(Team<threads> team, int64_t width, int past, const Body& body) {
  for (int64_t column = int64_t(team.rank()) * n - past; column < width; column += threads * n) {
    body(Span<n, false>{column, column < 0 ? past : 0, width - column < n ? int(width - column) : n});
  }
}

// Like the function above, but if `aligned` is true, it omits the bounds checks, so that several loads are in flight
// together.
template <int n, int threads, typename Body>
__device__ void for_spans(Team<threads> team, int64_t width, int past, bool aligned, const Body& body) {
  if (aligned) {
#pragma unroll 2
    for (int64_t column = int64_t(team.rank()) * n; column < width; column += threads * n) {
      body(Span<n, true>{column, 0, n});
    }
  } else {
    for_spans<n>(team, width, past, body);
  }
}

inline __device__ PhiloxKey read_key(const int64_t* key) {
  return {static_cast<uint64_t>(key[0]), static_cast<uint64_t>(key[1])};
}

// The number of elements of type T that are drawn and stored together: whole Philox blocks, and at least 16 bytes.
template <typename T>
constexpr int kDrawPacket = kPacket<T> > kPhiloxWords ? kPacket<T> : kPhiloxWords;

// Returns the draws for the elements first .. first + n - 1. `first` must be the first element of a Philox block,
// unless `across` is true.
template <typename Distribution, typename T, int n, bool across = false>
__device__ Packet<T, n> draw(PhiloxKey key, int64_t first) {
  static_assert(n % kPhiloxWords == 0);
  const auto draw_block = [&](int64_t block) {
    return Distribution::from(draw_words<T>(key, uint32_t(block), uint32_t(block >> 32)));
  };
  const int64_t block = uint64_t(first) / kPhiloxWords;  // signed division takes more instructions
  Packet<T, n> draws;
#pragma unroll
  for (int i = 0; i < n; i += kPhiloxWords) {
    const Draws<T> drawn = draw_block(block + i / kPhiloxWords);
#pragma unroll
    for (int w = 0; w < kPhiloxWords; ++w) {
      draws.value[i + w] = drawn.value[w];
    }
  }
  const int past = static_cast<int>(first % kPhiloxWords);
  if (across && past > 0) {
    const Draws<T> next = draw_block(block + n / kPhiloxWords);
    // Constant indices keep the draws in registers instead of local memory.
#pragma unroll
    for (int shift = 0; shift < kPhiloxWords - 1; ++shift) {
      if (shift < past) {
#pragma unroll
        for (int i = 0; i < n - 1; ++i) {
          draws.value[i] = draws.value[i + 1];
        }
        draws.value[n - 1] = next.value[shift];
      }
    }
  }
  return draws;
}

}  // namespace wakesleep::cuda
