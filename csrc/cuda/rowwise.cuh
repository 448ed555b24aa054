// How rows are divided among threads, read, and summed.
//
// A team of threads works on a row. Its size follows from the row's width alone, so a row's value does not depend on
// the batch it is in; sums go by shuffles, in a fixed order. A row is walked in spans of 16 bytes between the
// boundaries of its first operand, the first and the last of them ragged, so an odd width costs little; an operand
// that has no boundary there is read by single elements.
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

  // The sum over the team, in every thread of its first warp.
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
      __syncthreads();  // the row before may still be read
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

// Two blocks at least fit on a multiprocessor, up to 128 registers. Left to itself, the compiler spills a few of them
// for the sake of one block more.
template <int threads, typename RowBody>
__global__ void __launch_bounds__(kBlockThreads, 2) row_kernel(const RowBody body, int64_t rows) {
  for (int64_t row = Team<threads>::first(); row < rows; row += Team<threads>::count()) {
    body(Team<threads>{}, row);
  }
}

// body(team, row) for every row.
template <typename RowBody>
void launch_rows(int64_t rows, int64_t width, const RowBody& body) {
  const auto run = [&](auto team) {
    constexpr int per_block = decltype(team)::per_block;
    launch(row_kernel<decltype(team)::size, RowBody>, (rows + per_block - 1) / per_block, kBlockThreads, body, rows);
  };
  if (width <= 64) {
    run(Team<8>{});
  } else if (width <= 3072) {
    run(Team<32>{});
  } else {
    run(Team<kBlockThreads>{});
  }
}

// n consecutive elements.
template <typename T, int n>
struct Packet {
  T value[n];
};

// Elements of T in 16 bytes.
template <typename T>
constexpr int kPacket = 16 / sizeof(T);

// Where a packet lies in a row: n columns from `column` on, all of them inside unless it is a ragged one at either end.
template <int n, bool ragged>
struct Span {
  static constexpr int size = n;
  int64_t column;
  int64_t width;

  __device__ bool holds(int i) const { return !ragged || (column + i >= 0 && column + i < width); }
};

template <int n, typename T>
__device__ bool on_boundary(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % (sizeof(T) * n) == 0;
}

// What a packet is moved as, once or several times. Explicitly so: were it moved element by element, the compiler would
// find the aligned path no different from the unaligned one, and merge them.
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

// What a kernel only reads, and what it also writes: the one by way of a cache that sees no writes.
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

// The elements of `row` that the span holds; zeros for others.
template <typename compute_t, typename Access = ReadOnly, int n, bool ragged, typename T>
__device__ Packet<compute_t, n> load(Span<n, ragged> span, const T* row) {
  Packet<compute_t, n> values;
  if (!ragged && on_boundary<n>(row + span.column)) {
    const auto* from = reinterpret_cast<typename WideWords<T, n>::const_pointer>(row + span.column);
    WideWords<T, n> words;
#pragma unroll
    for (size_t w = 0; w < words.size(); ++w) {
      words[w] = Access::load(from + w);
    }
    const auto packet = wakesleep::bit_cast<Packet<T, n>>(words);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      values.value[i] = static_cast<compute_t>(packet.value[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      values.value[i] = span.holds(i) ? static_cast<compute_t>(row[span.column + i]) : compute_t(0);
    }
  }
  return values;
}

template <typename T, int n, bool ragged, typename compute_t>
__device__ void store(Span<n, ragged> span, const Packet<compute_t, n>& values, T* row) {
  if (!ragged && on_boundary<n>(row + span.column)) {
    auto* to = reinterpret_cast<typename WideWords<T, n>::pointer>(row + span.column);
    Packet<T, n> packet;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      packet.value[i] = static_cast<T>(values.value[i]);
    }
    const auto words = wakesleep::bit_cast<WideWords<T, n>>(packet);
#pragma unroll
    for (size_t w = 0; w < words.size(); ++w) {
      __stwb(to + w, words[w]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (span.holds(i)) {
        row[span.column + i] = static_cast<T>(values.value[i]);
      }
    }
  }
}

// How many elements a row begins past a boundary of n.
template <int n, typename T>
__device__ int past_boundary(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % n);
}

// body(span) for spans that cover a row which begins `past` elements after a boundary, divided among the team.
template <int n, int threads, typename Body>
__device__ void for_spans(Team<threads> team, int64_t width, int past, const Body& body) {
  const int64_t end = (past + width) / n;  // whole spans: past > 0 ? 1 : 0 .. end
#pragma unroll 2
  for (int64_t index = (past > 0 ? 1 : 0) + team.rank(); index < end; index += threads) {
    body(Span<n, false>{index * n - past, width});
  }
  const int64_t ragged = team.rank() == 0 ? 0 : end;
  const bool first_is_ragged = past > 0, last_is_ragged = (past + width) % n > 0 && !(end == 0 && first_is_ragged);
  if ((team.rank() == 0 && first_is_ragged) || (team.rank() == 1 && last_is_ragged)) {
    body(Span<n, true>{ragged * n - past, width});
  }
}

// Rows that a team takes at once, column by column, where their sum is wanted beside what else is made of them. In
// float64, more than two would not fit in the registers.
template <typename compute_t>
constexpr int kRowsOfSum = 16 / sizeof(compute_t);

inline int64_t rows_of_sum(at::ScalarType compute) {
  return compute == at::kDouble ? kRowsOfSum<double> : kRowsOfSum<float>;
}

inline __device__ PhiloxKey read_key(const int64_t* key) {
  return {static_cast<uint64_t>(key[0]), static_cast<uint64_t>(key[1])};
}

// Elements of T that are drawn and moved at once: whole blocks of draws, and 16 bytes at least.
template <typename T>
constexpr int kDrawPacket = kPacket<T> > kPhiloxWords ? kPacket<T> : kPhiloxWords;

// The draws for the elements first .. first + n - 1; `first` begins a block unless `across` allows it to lie within.
template <typename Distribution, typename T, int n, bool across = false>
__device__ Packet<T, n> draw(PhiloxKey key, int64_t first) {
  static_assert(n % kPhiloxWords == 0);
  const auto draw_block = [&](int64_t block) {
    return Distribution::from(draw_words<T>(key, uint32_t(block), uint32_t(block >> 32)));
  };
  const int64_t block = first / kPhiloxWords;
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
    // by constant indices, lest the draws go to local memory
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
