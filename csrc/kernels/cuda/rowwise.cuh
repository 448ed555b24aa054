// Assigns rows to threads, sums over rows, and draws random numbers for rows.
//
// A team of threads works on a row. If the row is reduced, the team size depends only on the row's width, so the sum
// does not depend on the batch. Reductions use warp shuffles in a fixed order.
#pragma once

#include "../densities.h"
#include "../philox.h"
#include "packets.cuh"

namespace wakesleep::cuda {

// The teams of a launch have a size of 2^log2_size threads. If `threads` is not 0, it is this size, known when the
// kernel is compiled.
template <int threads = 0>
struct Team {
  int log2_size = log2_of(threads);

  static constexpr int log2_of(int size) { return size <= 1 ? 0 : 1 + log2_of(size / 2); }

  __host__ __device__ int log2() const { return threads > 0 ? log2_of(threads) : log2_size; }
  __host__ __device__ int size() const { return 1 << log2(); }
  __host__ __device__ int per_block() const { return kBlockThreads >> log2(); }
  __device__ int rank() const { return threadIdx.x & (size() - 1); }
  __device__ int64_t first() const { return int64_t(blockIdx.x) * per_block() + (threadIdx.x >> log2()); }
  __device__ int64_t count() const { return int64_t(gridDim.x) * per_block(); }

  // Returns the sum over the team to every thread. A team has at most 32 threads, or all threads of the block.
  template <typename T>
  __device__ T sum(T value) const {
    const int lanes = min(size(), 32);
    const unsigned members = (0xffffffffu >> (32 - lanes)) << (threadIdx.x % 32 & -lanes);
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      value += __shfl_xor_sync(members, value, distance);
    }
    if (size() > 32) {
      constexpr int warps = kBlockThreads / 32;
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

// All threads of the grid, which work on one row together. It may end in the middle of a word.
constexpr int kWholeGrid = -1;

template <>
struct Team<kWholeGrid> {
  __device__ int size() const { return gridDim.x * kBlockThreads; }
  __device__ int rank() const { return blockIdx.x * kBlockThreads + threadIdx.x; }
  __device__ int64_t first() const { return 0; }
  __device__ int64_t count() const { return 1; }
};

// The number of blocks per multiprocessor for which a kernel is compiled: RowBody::kBlocks, or two, which allow 128
// registers per thread. One long row takes fewer registers than many rows. The number has to be chosen, because the
// compiler takes as many registers as it may, or spills some to fit one more block.
template <int threads, typename RowBody, typename = void>
constexpr int kBlocksOf = 2;
template <int threads, typename RowBody>
constexpr int kBlocksOf<threads, RowBody, std::void_t<decltype(RowBody::kBlocks)>> =
    RowBody::kBlocks + (threads == kWholeGrid && RowBody::kBlocks > 2 ? 1 : 0);

template <int threads, typename RowBody>
__global__ void __launch_bounds__(kBlockThreads, kBlocksOf<threads, RowBody>)
    row_kernel(const RowBody body, int64_t rows, const Team<threads> team) {
  wait_for_previous();
  for (int64_t row = team.first(); row < rows; row += team.count()) {
    body(team, row);
  }
}

template <int threads, typename RowBody>
void launch_teams(Stream stream, Team<threads> team, int64_t rows, const RowBody& body) {
  const int64_t per_block = team.per_block();
  launch(stream, row_kernel<threads, RowBody>, (rows + per_block - 1) / per_block, kBlockThreads, body, rows, team);
}

// The number of spans of n elements that a thread loads before it uses the first, so that several loads of each operand
// are in flight.
template <typename T, int n>
constexpr int kSpansAtOnce = n >= 4 || sizeof(T) * n >= 16 ? 2 : 4;

// Calls body(team, row) for every row. Each thread processes spans of n elements of type T a few times, which amortises
// the work done once per row. Short rows share a warp.
template <typename T, int n, typename RowBody>
void launch_rows_of(Stream stream, int64_t rows, int64_t width, const RowBody& body) {
  constexpr int64_t at_once = n * kSpansAtOnce<T, n>;
  const int64_t times = (width + at_once - 1) / at_once;
  const int log2_size = times <= 4 ? 2 : times <= 8 ? 3 : times <= 64 ? 4 : times <= 384 ? 5 : 8;
  launch_teams(stream, Team<>{log2_size}, rows, body);
}

// Like the function above, for spans whose alignment the kernel finds.
template <int n = 4, typename RowBody>
void launch_rows(Stream stream, int64_t rows, int64_t width, const RowBody& body) {
  launch_rows_of<float, n>(stream, rows, width, body);
}

// Like launch_rows_of, but for kernels that do not sum along a row. Their results do not depend on the size of the
// team. If there are too few rows to keep a GPU busy, the function uses one block per row, which is faster than smaller
// teams.
template <typename T, int n, typename RowBody>
void launch_free_rows(Stream stream, int64_t rows, int64_t width, const RowBody& body) {
  constexpr int64_t few = 1024;
  if (rows <= few && width > 32 * n) {
    launch_teams(stream, Team<>{Team<kBlockThreads>{}.log2()}, rows, body);
  } else {
    launch_rows_of<T, n>(stream, rows, width, body);
  }
}

// Returns true if the rows of every operand lie one after the other without gaps, so that they are one long row.
template <int operands>
bool is_one_row(const RowMap<operands>& rows, int64_t width) {
  bool contiguous = rows.dims <= 1;
  for (int i = 0; contiguous && rows.dims == 1 && i < operands; ++i) {
    contiguous = rows.stride[i][0] == width;
  }
  return contiguous;
}

// Calls body(team, 0) for one long row, in which every span is aligned. More blocks than a large GPU runs at once would
// repeat the work done once per thread.
template <typename T, int n, typename RowBody>
void launch_one_row(Stream stream, int64_t width, const RowBody& body) {
  constexpr int64_t few = 512, most = 2048;
  constexpr int64_t in_block = kBlockThreads * n;
  const int64_t blocks = (width + in_block - 1) / in_block;
  const int64_t used = std::min(std::max(blocks / kSpansAtOnce<T, n>, std::min(blocks, few)), most);
  launch(stream, row_kernel<kWholeGrid, RowBody>, used, kBlockThreads, body, int64_t(1), Team<kWholeGrid>{});
}

// Calls body(span) for every span of a row. The threads of the team divide the spans, which have n elements of type T,
// in words that divide the row, and begin `past` elements before the row. A thread processes several spans at once,
// unless `loops` is true: then the body is a loop itself.
template <typename T, int n, int word, bool loops = false, int threads, typename Body>
__device__ void for_words(Team<threads> team, int64_t row_width, int past, const Body& body) {
  constexpr int at_once = kSpansAtOnce<T, n>;
  constexpr bool narrow = at_once > 2;  // checks cost narrow spans less than more code would
  const int64_t width = threads == kWholeGrid ? row_width / n * n : row_width;
  const int64_t step = int64_t(team.size()) * n, own = int64_t(team.rank()) * n;
  int64_t start = -past;
  if constexpr (!loops && !narrow && word == n) {
#pragma unroll 1
    for (; start + at_once * step <= width; start += at_once * step) {
#pragma unroll
      for (int s = 0; s < at_once; ++s) {
        body(WordSpan<n, word, false>{start + s * step + own, 0, n});
      }
    }
  }
  const auto masked = [&](int64_t column) {
    body(WordSpan<n, word, true>{column, column < 0 ? past : 0, static_cast<int>(min(int64_t(n), width - column))});
  };
  if constexpr (!loops) {
#pragma unroll 1
    for (; start + (narrow ? 0 : step) < width; start += at_once * step) {
#pragma unroll
      for (int s = 0; s < at_once; ++s) {
        masked(start + s * step + own);
      }
    }
  }
  if constexpr (loops || !narrow) {
#pragma unroll 1
    for (; start < width; start += step) {
      masked(start + own);
    }
  }
  if constexpr (threads == kWholeGrid) {
    if (width < row_width && team.rank() == 0) {
      body(WordSpan<n, 1, true>{width, 0, static_cast<int>(row_width - width)});
    }
  }
}

// Calls body(span) for every span of a row, if its alignment is not known. The threads of the team divide the spans.
// The row begins `past` elements after an aligned address.
template <int n, int threads, typename Body>
__device__ void for_spans(Team<threads> team, int64_t width, int past, const Body& body) {
  for (int64_t column = int64_t(team.rank()) * n - past; column < width; column += team.size() * n) {
    body(Span<n, false>{column, column < 0 ? past : 0, width - column < n ? int(width - column) : n});
  }
}

// Like the function above, but if `aligned` is true, it omits the bounds checks, so that several loads are in flight
// together.
template <int n, int threads, typename Body>
__device__ void for_spans(Team<threads> team, int64_t width, int past, bool aligned, const Body& body) {
  if (aligned) {
#pragma unroll 2
    for (int64_t column = int64_t(team.rank()) * n; column < width; column += team.size() * n) {
      body(Span<n, true>{column, 0, n});
    }
  } else {
    for_spans<n>(team, width, past, body);
  }
}

// Returns the sum of term(elements...) over a row to every thread of the team. Elements beyond the end of the row are
// read as zeros, and the term of zeros must be zero.
template <typename compute_t, int word, int threads, typename Term, typename First, typename... Others>
__device__ compute_t sum_over_row(Team<threads> team, int64_t width, const Term& term, const First* first,
                                  const Others*... others) {
  compute_t sum = 0;
  for_words<First, word, word>(team, width, 0, [&](auto span) {
    const auto add_terms = [&](const auto&... packets) {
#pragma unroll
      for (int i = 0; i < word; ++i) {
        sum += term(packets.value[i]...);
      }
    };
    add_terms(load<compute_t>(span, first), load<compute_t>(span, others)...);
  });
  return team.sum(sum);
}

// Returns a key with its schedule. The empty assembly hides how the schedule is made. Otherwise, the compiler would
// make it again for every block.
inline __device__ ScheduledKey read_key(const int64_t* from) {
  const PhiloxKey key = {static_cast<uint64_t>(from[0]), static_cast<uint64_t>(from[1])};
  ScheduledKey scheduled = {key, PhiloxSchedule(key.seed)};
#ifdef __CUDA_ARCH__
#pragma unroll
  for (auto& round : scheduled.schedule.word) {
    asm("" : "+r"(round[0]), "+r"(round[1]));
  }
#endif
  return scheduled;
}

// The number of elements of type T that are drawn and stored together: one Philox block, or two for types of 16 bits.
template <typename T>
constexpr int kDrawPacket = sizeof(T) == 2 ? 8 : kPhiloxWords;

// See kBlocksOf. A sampler computes for long between its loads, so it needs many threads. In float64, it would spill.
template <typename T>
constexpr int kBlocksOfSampler = sizeof(T) == 8 ? 2 : 3;

// The standard normals for results of type T.
template <typename T>
using NormalsFor = std::conditional_t<sizeof(T) == 2, ApproximateNormals, StandardNormals>;

// Returns e^(logvar/2) for results of type T.
template <typename T, typename compute_t>
__device__ compute_t sigma_for(compute_t logvar) {
  if constexpr (sizeof(T) == 2) {
    return exp_approx(0.5f * logvar);
  } else {
    return gaussian_sigma(logvar);
  }
}

// Returns the draws for the elements first .. first + n - 1. `first` must be the first element of a Philox block,
// unless `across` is true.
template <typename Distribution, typename T, int n, bool across = false>
__device__ Packet<T, n> draw(const ScheduledKey& key, int64_t first) {
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

// Launches a kernel that draws `samples` times `rows` rows and sums nothing over them. make(word, rows, width) returns
// the body of the kernel. `starts` are the places of the first addresses of all operands. If the rows of every operand
// lie one after the other, they are drawn as one long row.
template <typename T, int operands, typename Make>
void launch_draws(Stream stream, uint64_t starts, const RowMap<operands>& rows, int64_t samples, int64_t width,
                  const Make& make) {
  constexpr int n = kDrawPacket<T>;
  if (samples == 1 && is_one_row(rows, width) && starts % n == 0) {
    const int64_t all = rows.rows * width;
    launch_one_row<T, n>(stream, all, make(std::integral_constant<int, n>{}, RowMap<operands>{}, all));
  } else {
    uint64_t all = starts | static_cast<uint64_t>(width);
    for (int operand = 0; operand < operands; ++operand) {
      all |= strides(rows, operand);
    }
    dispatch_word<n>(
        all, [&](auto word) { launch_free_rows<T, n>(stream, samples * rows.rows, width, make(word, rows, width)); });
  }
}

}  // namespace wakesleep::cuda
