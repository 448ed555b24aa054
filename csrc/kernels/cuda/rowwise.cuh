// Assigns rows to threads, sums over rows, and draws random numbers for rows.
//
// A team of threads works on a row. If the row is reduced, the team size depends only on the row's width, so the sum
// does not depend on the batch. Reductions use warp shuffles in a fixed order.
#pragma once

#include "../philox.h"
#include "packets.cuh"

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
  wait_for_previous();
  for (int64_t row = Team<threads>::first(); row < rows; row += Team<threads>::count()) {
    body(Team<threads>{}, row);
  }
}

template <int threads, typename RowBody>
void launch_teams(Stream stream, Team<threads>, int64_t rows, const RowBody& body) {
  constexpr int per_block = Team<threads>::per_block;
  launch(stream, row_kernel<threads, RowBody>, (rows + per_block - 1) / per_block, kBlockThreads, body, rows);
}

// Calls body(team, row) for every row. Each thread processes a few spans of n elements, which amortises the work done
// once per row.
template <int n = 4, typename RowBody>
void launch_rows(Stream stream, int64_t rows, int64_t width, const RowBody& body) {
  const int64_t spans = (width + n - 1) / n;
  if (spans <= 16) {
    launch_teams(stream, Team<8>{}, rows, body);
  } else if (spans <= 128) {
    launch_teams(stream, Team<16>{}, rows, body);
  } else if (spans <= 768) {
    launch_teams(stream, Team<32>{}, rows, body);
  } else {
    launch_teams(stream, Team<kBlockThreads>{}, rows, body);
  }
}

// Like launch_rows, but for kernels that do not sum along a row. Their results do not depend on the size of the team.
// If there are too few rows to keep a GPU busy, the function uses one block per row, which is faster than smaller
// teams.
template <int n, typename RowBody>
void launch_free_rows(Stream stream, int64_t rows, int64_t width, const RowBody& body) {
  constexpr int64_t few = 1024;
  if (rows <= few && width > 32 * n) {
    launch_teams(stream, Team<kBlockThreads>{}, rows, body);
  } else {
    launch_rows<n>(stream, rows, width, body);
  }
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

// Returns the sum of term(elements...) over a row to every thread of the team. The spans are aligned in the first
// operand. Elements beyond the ends of the row are read as zeros, and the term of zeros must be zero.
template <typename compute_t, int threads, typename Term, typename First, typename... Others>
__device__ compute_t sum_over_row(Team<threads> team, int64_t width, const Term& term, const First* first,
                                  const Others*... others) {
  constexpr int n = kPacket<First>;
  compute_t sum = 0;
  for_spans<n>(team, width, past_boundary<n>(first), aligned<n>(width, first, others...), [&](auto span) {
    const auto add_terms = [&](const auto&... packets) {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        sum += term(packets.value[i]...);
      }
    };
    add_terms(load<compute_t>(span, first), load<compute_t>(span, others)...);
  });
  return team.sum(sum);
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
