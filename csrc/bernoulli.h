// Operands of the Bernoulli ops. Every backend uses the same checks and the same layout.
#pragma once

#include "dispatch.h"
#include "geometry.h"

namespace wakesleep {

// Converts x to a dtype that the kernels read: uint8, the dtype of the parameters, or their compute dtype.
inline at::Tensor observation(const char* op, const at::Tensor& x, at::ScalarType parameters) {
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kBool || type == at::kByte || at::isFloatingType(type), op,
                   ": expected x to be bool, uint8 or floating, got ", type);
  if (type == at::kBool) {
    return with_contiguous_events(x.view(at::kByte).ne(0).view(at::kByte));  // any nonzero byte is true
  }
  return with_contiguous_events(type == at::kByte || type == parameters ? x : x.to(at::toOpMathType(parameters)));
}

// Returns the dtype that the kernels write if the caller requests `dtype`: `dtype` itself if it is the parameters'
// dtype, and uint8 otherwise.
inline at::ScalarType written_dtype(const char* op, at::ScalarType dtype, at::ScalarType parameters) {
  TORCH_CHECK_TYPE(dtype == at::kBool || dtype == at::kByte || at::isFloatingType(dtype), op,
                   ": expected dtype to be bool, uint8 or floating, got ", dtype);
  return dtype == parameters ? dtype : at::kByte;
}

// Converts a tensor of zeros and ones to the requested dtype. The conversion from uint8 to bool returns a view.
inline at::Tensor as_dtype(const at::Tensor& zeros_and_ones, at::ScalarType dtype) {
  return dtype == at::kBool ? zeros_and_ones.view(at::kBool) : zeros_and_ones.to(dtype);
}

// Calls body(Type<parameter_t>{}, Type<written_t>{}), where `written` is the dtype that written_dtype() returned.
template <typename Body>
void dispatch_floating_and_written(const char* op, at::ScalarType parameters, at::ScalarType written,
                                   const Body& body) {
  dispatch_floating(op, parameters, [&](auto type) {
    if (written == at::kByte) {
      return body(type, Type<uint8_t>{});
    }
    body(type, type);
  });
}

// The checked operands of the log-likelihood and of its gradient.
struct BernoulliOperands {
  at::Tensor logits;    // [*S, *B, D]
  at::Tensor x;         // [*B, D]
  at::DimVector batch;  // broadcast shape of the leading dimensions
  int64_t D;

  BernoulliOperands(const char* op, const at::Tensor& logits_in, const at::Tensor& x_in) {
    check_floating(op, {"logits", logits_in});
    check_same_event(op, {"logits", logits_in}, {"x", x_in});
    logits = with_contiguous_events(logits_in);
    x = observation(op, x_in, logits.scalar_type());
    batch = broadcast_batch(op, {"logits", logits}, {"x", x});
    D = logits.size(-1);
  }

  template <typename Body>
  void dispatch(const char* op, const Body& body) const {
    dispatch_floating_and_value(op, logits.scalar_type(), x.scalar_type(), body);
  }
};

struct BernoulliLogProb : BernoulliOperands {
  static constexpr auto op = "bernoulli_log_prob";
  at::Tensor log_prob;  // [*S, *B]
  RowMap<2> rows;       // operands: logits, x

  BernoulliLogProb(const at::Tensor& logits_in, const at::Tensor& x_in) : BernoulliOperands(op, logits_in, x_in) {
    log_prob = aten::empty(batch, logits.options().dtype(at::toOpMathType(logits.scalar_type())));
    rows = map_rows<2>(batch, {row_strides(logits, batch), row_strides(x, batch)});
  }
};

struct BernoulliLogProbBackward : BernoulliOperands {
  static constexpr auto op = "bernoulli_log_prob_backward";
  at::Tensor grad;          // [*S, *B]
  RowGroups<3> rows;        // operands: logits, x, grad; the outer rows are the rows of logits
  GradientSum grad_logits;  // with the shape and dtype of logits

  BernoulliLogProbBackward(const at::Tensor& grad_in, const at::Tensor& logits_in, const at::Tensor& x_in)
      : BernoulliOperands(op, logits_in, x_in),
        grad(check_row_gradient(op, "grad", grad_in, batch, {"logits", logits})),
        rows(group_rows<3>(batch, batch_sizes(logits),
                           {row_strides(logits, batch), row_strides(x, batch), row_strides(grad, batch, 0)})),
        grad_logits(logits, logits.sizes(), rows.inner.rows) {}
};

struct BernoulliSample {
  static constexpr auto op = "bernoulli_sample";
  at::Tensor logits;  // [*B, D]
  at::Tensor key;     // [2]
  int64_t D;
  int64_t samples;       // the product of the sample shape
  at::ScalarType dtype;  // of the result
  at::Tensor x;          // [*S, *B, D], uint8 or the dtype of the logits
  RowMap<1> rows;        // operand: logits; covers the rows of one sample

  BernoulliSample(const at::Tensor& logits_in, const at::Tensor& key_in, at::IntArrayRef sample_shape,
                  std::optional<at::ScalarType> dtype_in)
      : logits(logits_in),
        key(key_in),
        samples(c10::multiply_integers(sample_shape)),
        dtype(dtype_in.value_or(logits_in.scalar_type())) {
    check_floating(op, {"logits", logits});
    check_event(op, {"logits", logits});
    check_key(op, key, {"logits", logits});
    check_sample_shape(op, sample_shape);
    D = logits.size(-1);
    logits = with_contiguous_events(logits);
    x = aten::empty(concat(sample_shape, logits.sizes()),
                    logits.options().dtype(written_dtype(op, dtype, logits.scalar_type())));
    if (x.numel() == 0) {
      samples = 0;  // the output is empty, so there is nothing to draw
    }
    const auto batch = batch_sizes(logits);
    rows = map_rows<1>(batch, {row_strides(logits, batch)});
  }

  template <typename Body>
  void dispatch(const Body& body) const {
    dispatch_floating_and_written(op, logits.scalar_type(), x.scalar_type(), body);
  }

  at::Tensor result() const { return as_dtype(x, dtype); }
};

struct Binarize {
  static constexpr auto op = "binarize";
  at::Tensor grey;                  // [N, D]
  at::Tensor key;                   // [2]
  int white;                        // the grey level at which x is always 1
  std::optional<at::Tensor> index;  // [B]
  int64_t N, D;
  int64_t rows;          // B if there is an index, otherwise N
  at::ScalarType dtype;  // of the result
  at::Tensor x;          // [B, D], uint8 or float32

  Binarize(const at::Tensor& grey_in, const at::Tensor& key_in, int64_t white_in,
           const std::optional<at::Tensor>& index_in, std::optional<at::ScalarType> dtype_in)
      : grey(grey_in), key(key_in), white(static_cast<int>(white_in)), dtype(dtype_in.value_or(at::kByte)) {
    TORCH_CHECK_TYPE(grey.scalar_type() == at::kByte, op, ": expected grey to be uint8, got ", grey.scalar_type());
    TORCH_CHECK_VALUE(grey.dim() == 2, op, ": expected grey to have shape [N, D], got ", grey.sizes());
    TORCH_CHECK_VALUE(white_in >= 1 && white_in <= 255, op, ": expected white in 1 .. 255, got ", white_in);
    check_key(op, key, {"grey", grey});
    N = rows = grey.size(0);
    D = grey.size(1);
    grey = with_contiguous_events(grey);
    if (index_in) {
      check_same_device(op, {"grey", grey}, {"index", *index_in});
      TORCH_CHECK_TYPE(index_in->scalar_type() == at::kLong, op, ": expected index to be int64, got ",
                       index_in->scalar_type());
      TORCH_CHECK_VALUE(index_in->dim() == 1, op, ": expected index to have shape [B], got ", index_in->sizes());
      index = index_in->contiguous();
      rows = index->size(0);
    }
    x = aten::empty({rows, D}, grey.options().dtype(written_dtype(op, dtype, at::kFloat)));
  }

  const int64_t* index_data() const { return index ? index->const_data_ptr<int64_t>() : nullptr; }

  // Calls body(Type<x_t>{}).
  template <typename Body>
  void dispatch(const Body& body) const {
    x.scalar_type() == at::kByte ? body(Type<uint8_t>{}) : body(Type<float>{});
  }

  at::Tensor result() const { return as_dtype(x, dtype); }
};

}  // namespace wakesleep
