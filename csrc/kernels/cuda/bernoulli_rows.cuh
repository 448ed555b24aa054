// Operations on a row of logits. A functor provides the logits: logits(span) returns the logits of a span in the
// compute type. for_spans<n>(team, D, past, aligned) iterates over the row.
#pragma once

#include "../densities.h"
#include "rowwise.cuh"

namespace wakesleep::cuda {

template <typename logit_t, typename computed_t = Compute<logit_t>>
struct StoredLogits {
  using compute_t = computed_t;
  const logit_t* row;  // [D]

  template <typename Span>
  __device__ auto operator()(Span span) const {
    return load<compute_t>(span, row);
  }

  template <int n, typename Other>
  __device__ bool aligned_with(const Other* other, int64_t D) const {
    return aligned<n>(D, row, other);
  }
};

// Logits, stored without the bias, which is added on each read.
template <typename T>
struct ProductAndBias {
  using compute_t = T;
  const compute_t* product;  // [D]
  const compute_t* bias;     // [D]

  template <typename Span>
  __device__ auto operator()(Span span) const {
    auto logits = load<compute_t>(span, product);
    const auto b = load<compute_t>(span, bias);
#pragma unroll
    for (int i = 0; i < span.size; ++i) {
      logits.value[i] += b.value[i];
    }
    return logits;
  }

  template <int n, typename Other>
  __device__ bool aligned_with(const Other* other, int64_t D) const {
    return aligned<n>(D, product, bias, other);
  }
};

// Accumulates one thread's part of sum_d [x a - softplus(a)].
template <typename compute_t>
struct LogProbSum {
  compute_t linear = 0, product = 1;
  int factors = 0;

  template <typename Span, int n>
  __device__ void add(Span span, const Packet<compute_t, n>& a, const Packet<compute_t, n>& v) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const BernoulliTerm<compute_t> term(a.value[i], v.value[i]);
      linear += term.linear;
      product *= span.holds(i) ? term.factor : compute_t(1);
    }
    factors += n;
    if (factors > kFactorsPerLog) {
      linear -= log_of_normal(product);
      product = 1;
      factors = 0;
    }
  }

  // Returns the sum of the parts of all threads in the team.
  template <int threads>
  __device__ compute_t total(Team<threads> team) const {
    return team.sum(linear - log_of_normal(product));
  }

  template <int threads>
  __device__ void write(Team<threads> team, compute_t* log_prob) const {
    const compute_t sum = total(team);
    if (team.rank() == 0) {
      *log_prob = sum;
    }
  }
};

template <int n, int threads, typename Logits, typename x_t, typename compute_t>
__device__ void write_log_prob(Team<threads> team, int64_t D, int past, const Logits& logits, const x_t* x,
                               compute_t* log_prob) {
  LogProbSum<compute_t> sum;
  for_spans<n>(team, D, past, logits.template aligned_with<n>(x, D),
               [&](auto span) { sum.add(span, logits(span), load<compute_t>(span, x)); });
  sum.write(team, log_prob);
}

// Like the function above, for spans in words.
template <typename logit_t, int word, int threads, typename x_t, typename compute_t>
__device__ void write_log_prob_of_words(Team<threads> team, int64_t D, const logit_t* logits, const x_t* x,
                                        compute_t* log_prob) {
  LogProbSum<compute_t> sum;
  for_words<logit_t, word, word>(
      team, D, 0, [&](auto span) { sum.add(span, load<compute_t>(span, logits), load<compute_t>(span, x)); });
  sum.write(team, log_prob);
}

// Returns [u <= p] without a division. If p = sigmoid(a), it tests u + u e^-a <= 1 instead. The code evaluates u - 1,
// which is exact for u >= 1/2. The tolerance, epsilon / 4, ensures that x = 1 for every u if sigmoid(a) rounds to 1.
template <typename T>
__device__ bool draws_one(OfLogit, T u, T logit) {
  return u * wakesleep::exp(-logit) + (u - T(1)) <= std::numeric_limits<T>::epsilon() / T(4);
}

template <typename T>
__device__ bool draws_one(OfGrey probability, T u, T grey) {
  return u * T(probability.white) <= grey;
}

// Draws x = [u <= probability(v)] for a row of values v of type T. The row begins at element `first` of the whole draw.
template <typename T, int word, int threads, typename Probability, typename Values, typename x_t>
__device__ void draw_row(Team<threads> team, const ScheduledKey& key, int64_t first, int64_t D,
                         const Probability& probability, const Values& values_of, x_t* x) {
  constexpr int n = kDrawPacket<T>;
  for_words<T, n, word>(team, D, static_cast<int>(uint64_t(first) % n), [&](auto span) {
    const auto values = values_of(span);
    const auto u = draw<Uniforms, typename Values::compute_t, n>(key, first + span.column);
    Packet<x_t, n> drawn;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      drawn.value[i] = static_cast<x_t>(draws_one(probability, u.value[i], values.value[i]) ? 1 : 0);
    }
    store(span, drawn, x);
  });
}

}  // namespace wakesleep::cuda
