#include "../linear_bernoulli_log_prob.h"

#include "bernoulli_rows.cuh"
#include "column_sums.cuh"
#include "small_batch.cuh"

namespace wakesleep::cuda {
namespace {

template <typename compute_t, typename x_t>
struct LinearBernoulliLogProbRows {
  const compute_t* __restrict__ products;
  const compute_t* __restrict__ bias;
  const x_t* __restrict__ x;
  compute_t* __restrict__ log_prob;
  RowMap<1> rows;
  int64_t first;   // first row of the chunk
  int64_t stride;  // row stride of products
  int64_t D;

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t row) const {
    const ProductAndBias<compute_t> logits = {products + row * stride, bias};
    const int past = past_boundary<kPacket<compute_t>>(logits.product);
    write_log_prob<kPacket<compute_t>>(team, D, past, logits, x + rows(first + row).of[0], log_prob + row);
  }
};

// Writes the gradient of a chunk's logits and, if with_terms is true, the weighted log-likelihoods. row_kernel uses
// this struct to process rows separately. summed_rows_kernel also sums the gradient over rows. grad_logits may alias
// products.
template <typename compute_t, typename x_t, typename grad_t, bool with_terms>
struct LinearBernoulliLogProbBackwardRows {
  static constexpr int kSpan = kPacket<compute_t>;
  const compute_t* products;
  const compute_t* __restrict__ bias;
  const x_t* __restrict__ x;
  const compute_t* __restrict__ upstream;  // null if all are 1
  compute_t scale;
  compute_t* __restrict__ terms;
  compute_t* __restrict__ log_prob;  // null if not needed
  grad_t* grad_logits;
  RowMap<2> rows;
  int64_t first;  // first row of the chunk
  int64_t products_stride, grad_stride;
  int64_t D;

  struct Row {
    int64_t row;  // index within the chunk
    const x_t* x;
    compute_t weight;
    LogProbSum<compute_t> log_prob;
  };

  __device__ Row begin(int64_t row) const {
    const auto offset = rows(first + row);
    return {row, x + offset.of[0], upstream == nullptr ? scale : scale * upstream[offset.of[1]], {}};
  }

  struct Read {
    Packet<compute_t, kSpan> a, x;
  };

  template <typename Span>
  __device__ Read read(const Row& its, Span span) const {
    return {load<compute_t, Written>(span, products + its.row * products_stride), load<compute_t>(span, its.x)};
  }

  template <typename Span>
  __device__ auto make(Row& its, Span span, const Read& of) const {
    const auto b = load<compute_t>(span, bias);
    auto a = of.a;
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      a.value[i] += b.value[i];
    }
    if constexpr (with_terms) {
      its.log_prob.add(span, a, of.x);
    }
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      a.value[i] = its.weight * bernoulli_grad_logits(a.value[i], of.x.value[i]);
    }
    store(span, a, grad_logits + its.row * grad_stride);
    return a;
  }

  template <int threads>
  __device__ void end(Team<threads> team, const Row& its) const {
    if constexpr (with_terms) {
      const compute_t sum = its.log_prob.total(team);
      if (team.rank() == 0) {
        terms[its.row] = its.weight * sum;
        if (log_prob != nullptr) {
          log_prob[its.row] = sum;
        }
      }
    }
  }

  template <int threads>
  __device__ void operator()(Team<threads> team, int64_t row) const {
    Row its = begin(row);
    for_spans<kSpan>(team, D, 0, [&](auto span) { make(its, span, read(its, span)); });
    end(team, its);
  }
};

// Writes the gradient of each product, and returns the element's part of the weighted log-likelihood.
template <typename scalar_t, typename x_t>
struct WriteGradient {
  using compute_t = Compute<scalar_t>;
  const compute_t* __restrict__ bias;
  const x_t* __restrict__ x;
  const compute_t* __restrict__ upstream;  // null if all are 1
  compute_t scale;
  RowMap<2> rows;
  scalar_t* __restrict__ grad_products;
  compute_t* __restrict__ terms;  // one for each tile
  int64_t D;

  __device__ compute_t operator()(int64_t row, int64_t column, compute_t product) const {
    const auto offset = rows(row);
    const compute_t weight = upstream == nullptr ? scale : scale * upstream[offset.of[1]];
    const compute_t a = product + bias[column], v = static_cast<compute_t>(x[offset.of[0] + column]);
    grad_products[row * D + column] = static_cast<scalar_t>(weight * bernoulli_grad_logits(a, v));
    const BernoulliTerm<compute_t> term(a, v);
    return weight * (term.linear - log_of_normal(term.factor));
  }

  __device__ void put(int64_t tile, compute_t sum) const { terms[tile] = sum; }
};

// Calls body(Type<grad_t>{}), where grad_t is compute_t or, if compute_t is float, a 16-bit type.
template <typename compute_t, typename Body>
void dispatch_gradient(Dtype dtype, const Body& body) {
  if constexpr (std::is_same_v<compute_t, float>) {
    dtype == Dtype::float16    ? body(Type<Half>{})
    : dtype == Dtype::bfloat16 ? body(Type<BFloat16>{})
                               : body(Type<float>{});
  } else {
    body(Type<compute_t>{});
  }
}

template <bool with_terms, typename compute_t, typename x_t, typename grad_t>
void write_gradient(const LinearBernoulliGradient& call, Stream stream) {
  const LinearBernoulliLogProbBackwardRows<compute_t, x_t, grad_t, with_terms> rows = {
      static_cast<const compute_t*>(call.products),
      static_cast<const compute_t*>(call.bias),
      static_cast<const x_t*>(call.x),
      static_cast<const compute_t*>(call.upstream),
      static_cast<compute_t>(call.scale),
      static_cast<compute_t*>(call.terms),
      static_cast<compute_t*>(call.log_prob),
      static_cast<grad_t*>(call.grad_logits),
      call.rows,
      call.first,
      call.products_stride,
      call.grad_stride,
      call.D};
  if (call.sums != nullptr) {
    launch_summed_rows(stream, rows, static_cast<compute_t*>(call.sums), call.count, call.D);
  } else {  // the batch is small: one block per row
    launch_teams(stream, Team<kBlockThreads>{}, call.count, rows);
  }
}

}  // namespace

void compute(const LinearBernoulliLogProb& call, Stream stream) {
  dispatch_computed_and_value(call.dtype, call.x_dtype, [&](auto type, auto x_type) {
    using compute_t = typename decltype(type)::type;
    using x_t = typename decltype(x_type)::type;
    launch_rows(stream, call.count, call.D,
                LinearBernoulliLogProbRows<compute_t, x_t>{
                    static_cast<const compute_t*>(call.products), static_cast<const compute_t*>(call.bias),
                    static_cast<const x_t*>(call.x), static_cast<compute_t*>(call.log_prob), call.rows, call.first,
                    call.products_stride, call.D});
  });
}

void compute(const SmallBatchBernoulliGradient& call, Stream stream) {
  dispatch_floating(call.layer.dtype, [&](auto type) {
    using scalar_t = typename decltype(type)::type;
    using compute_t = Compute<scalar_t>;
    const auto launch_for = [&](auto x_type) {
      using x_t = typename decltype(x_type)::type;
      launch_layer<scalar_t>(
          stream, call.layer,
          WriteGradient<scalar_t, x_t>{static_cast<const compute_t*>(call.bias), static_cast<const x_t*>(call.x),
                                       static_cast<const compute_t*>(call.upstream), static_cast<compute_t>(call.scale),
                                       call.rows, static_cast<scalar_t*>(call.grad_products),
                                       static_cast<compute_t*>(call.terms), call.layer.D});
    };
    call.x_dtype == Dtype::uint8 ? launch_for(Type<uint8_t>{}) : launch_for(Type<compute_t>{});
  });
}

void compute(const LinearBernoulliGradient& call, Stream stream) {
  dispatch_computed_and_value(call.dtype, call.x_dtype, [&](auto type, auto x_type) {
    using compute_t = typename decltype(type)::type;
    using x_t = typename decltype(x_type)::type;
    dispatch_gradient<compute_t>(call.grad_dtype, [&](auto grad_type) {
      using grad_t = typename decltype(grad_type)::type;
      call.terms != nullptr ? write_gradient<true, compute_t, x_t, grad_t>(call, stream)
                            : write_gradient<false, compute_t, x_t, grad_t>(call, stream);
    });
  });
}

}  // namespace wakesleep::cuda
