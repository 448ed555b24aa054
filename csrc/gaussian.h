// Operands of the Gaussian ops. Every backend uses the same checks and the same layout.
#pragma once

#include "dispatch.h"
#include "geometry.h"

namespace wakesleep {

// mu and logvar, converted to a common dtype, and the broadcast shape of their leading dimensions.
struct GaussianParameters {
  at::Tensor mu, logvar;  // [*B, K]
  at::DimVector batch;
  int64_t K;

  GaussianParameters(const char* op, const at::Tensor& mu_in, const at::Tensor& logvar_in)
      : mu(mu_in), logvar(logvar_in) {
    check_floating(op, {"mu", mu});
    check_floating(op, {"logvar", logvar});
    check_same_event(op, {"mu", mu}, {"logvar", logvar});
    batch = broadcast_batch(op, {"mu", mu}, {"logvar", logvar});
    K = mu.size(-1);
    promote_to(c10::promoteTypes(mu.scalar_type(), logvar.scalar_type()));
  }

  void promote_to(at::ScalarType dtype) {
    mu = with_contiguous_events(mu.to(dtype));
    logvar = with_contiguous_events(logvar.to(dtype));
  }

  // Returns [*B, 2K]. Both gradients have this shape when they are packed like a network output [mu | logvar].
  at::DimVector packed_shape() const { return concat(batch, {2 * K}); }

  at::ScalarType dtype() const { return mu.scalar_type(); }
  at::ScalarType compute_dtype() const { return at::toOpMathType(dtype()); }
};

struct GaussianRsample : GaussianParameters {
  const char* op;
  at::Tensor key;       // [2]
  int64_t samples;      // the product of the sample shape
  at::Tensor z;         // [*S, *B, K]
  at::Tensor log_prob;  // [*S, *B], if requested
  RowMap<2> rows;       // operands: mu, logvar; covers the rows of one sample

  GaussianRsample(const char* op_in, const at::Tensor& mu_in, const at::Tensor& logvar_in, const at::Tensor& key_in,
                  at::IntArrayRef sample_shape, bool with_log_prob)
      : GaussianParameters(op_in, mu_in, logvar_in),
        op(op_in),
        key(key_in),
        samples(c10::multiply_integers(sample_shape)) {
    check_key(op, key, {"mu", mu});
    check_sample_shape(op, sample_shape);
    const auto z_batch = concat(sample_shape, batch);
    z = aten::empty(concat(z_batch, {K}), mu.options());
    if (!with_log_prob && z.numel() == 0) {
      samples = 0;  // the output is empty, so there is nothing to draw
    }
    if (with_log_prob) {
      log_prob = aten::empty(z_batch, mu.options().dtype(compute_dtype()));
    }
    rows = map_rows<2>(batch, {row_strides(mu, batch), row_strides(logvar, batch)});
  }
};

struct GaussianRsampleBackward : GaussianParameters {
  static constexpr auto op = "gaussian_rsample_backward";
  at::Tensor key;            // [2]
  int64_t samples;           // the product of the sample shape
  at::Tensor grad_z;         // [*S, *B, K], contiguous, or undefined
  at::Tensor grad_log_prob;  // [*S, *B], contiguous, or undefined
  RowMap<1> rows;            // operand: logvar
  GradientSum grad;          // [*B, 2K]: [grad_mu | grad_logvar]

  GaussianRsampleBackward(const std::optional<at::Tensor>& grad_z_in, const std::optional<at::Tensor>& grad_log_prob_in,
                          const at::Tensor& mu_in, const at::Tensor& logvar_in, const at::Tensor& key_in,
                          at::IntArrayRef sample_shape)
      : GaussianParameters(op, mu_in, logvar_in),
        key(key_in),
        samples(mu.numel() == 0 ? 0 : c10::multiply_integers(sample_shape)),
        rows(map_rows<1>(batch, {row_strides(logvar, batch)})),
        grad(mu, packed_shape(), samples) {
    check_key(op, key, {"mu", mu});
    check_sample_shape(op, sample_shape);
    const auto z_batch = concat(sample_shape, batch);
    if (grad_z_in && grad_z_in->defined()) {
      const auto shape = concat(z_batch, {K});
      TORCH_CHECK_VALUE(grad_z_in->sizes() == shape, op, ": expected grad_z to have shape ", shape, ", got ",
                        grad_z_in->sizes());
      grad_z = grad_z_in->to(dtype()).contiguous();
    }
    if (grad_log_prob_in && grad_log_prob_in->defined()) {
      grad_log_prob = check_row_gradient(op, "grad_log_prob", *grad_log_prob_in, z_batch, {"mu", mu}).contiguous();
    }
  }
};

// The parameters and a value z that broadcasts with them.
struct GaussianOperands : GaussianParameters {
  at::Tensor z;               // [*S, *B, K]
  at::DimVector value_batch;  // broadcast shape of the leading dimensions of mu, logvar and z

  GaussianOperands(const char* op, const at::Tensor& mu_in, const at::Tensor& logvar_in, const at::Tensor& z_in)
      : GaussianParameters(op, mu_in, logvar_in) {
    check_floating(op, {"z", z_in});
    check_same_event(op, {"mu", mu}, {"z", z_in});
    promote_to(c10::promoteTypes(dtype(), z_in.scalar_type()));
    z = with_contiguous_events(z_in.to(dtype()));
    value_batch = broadcast_batch(op, {"mu and logvar", mu.expand(concat(batch, {K}))}, {"z", z});
  }
};

struct GaussianLogProb : GaussianOperands {
  static constexpr auto op = "gaussian_log_prob";
  at::Tensor log_prob;  // [*S, *B]
  RowMap<3> rows;       // operands: mu, logvar, z

  GaussianLogProb(const at::Tensor& mu_in, const at::Tensor& logvar_in, const at::Tensor& z_in)
      : GaussianOperands(op, mu_in, logvar_in, z_in) {
    log_prob = aten::empty(value_batch, mu.options().dtype(compute_dtype()));
    rows = map_rows<3>(value_batch,
                       {row_strides(mu, value_batch), row_strides(logvar, value_batch), row_strides(z, value_batch)});
  }
};

struct GaussianLogProbBackward : GaussianOperands {
  static constexpr auto op = "gaussian_log_prob_backward";
  at::Tensor grad;              // [*S, *B]
  at::Tensor grad_z;            // [*S, *B, K], or empty if not needed
  RowGroups<5> rows;            // operands: mu, logvar, z, grad, grad_z; outer rows: the rows of mu and logvar
  GradientSum grad_parameters;  // [*B, 2K]: [grad_mu | grad_logvar]

  GaussianLogProbBackward(const at::Tensor& grad_in, const at::Tensor& mu_in, const at::Tensor& logvar_in,
                          const at::Tensor& z_in, bool with_grad_z)
      : GaussianOperands(op, mu_in, logvar_in, z_in),
        grad(check_row_gradient(op, "grad", grad_in, value_batch, {"mu", mu})),
        grad_z(aten::empty(concat(value_batch, {with_grad_z ? K : 0}), mu.options())),
        rows(group_rows<5>(value_batch, batch,
                           {row_strides(mu, value_batch), row_strides(logvar, value_batch), row_strides(z, value_batch),
                            row_strides(grad, value_batch, 0), row_strides(grad_z, value_batch)})),
        grad_parameters(mu, packed_shape(), rows.inner.rows) {}
};

struct StandardGaussianLogProb {
  static constexpr auto op = "standard_gaussian_log_prob";
  at::Tensor z;  // [*B, K]
  int64_t K;
  at::Tensor log_prob;  // [*B]
  RowMap<1> rows;       // operand: z

  explicit StandardGaussianLogProb(const at::Tensor& z_in) {
    check_floating(op, {"z", z_in});
    check_event(op, {"z", z_in});
    z = with_contiguous_events(z_in);
    K = z.size(-1);
    const auto batch = batch_sizes(z);
    log_prob = aten::empty(batch, z.options().dtype(at::toOpMathType(z.scalar_type())));
    rows = map_rows<1>(batch, {row_strides(z, batch)});
  }
};

struct StandardGaussianLogProbBackward {
  static constexpr auto op = "standard_gaussian_log_prob_backward";
  at::Tensor z;  // [*B, K]
  int64_t K;
  at::Tensor grad;    // [*B]
  at::Tensor grad_z;  // [*B, K]
  RowMap<2> rows;     // operands: z, grad

  StandardGaussianLogProbBackward(const at::Tensor& grad_in, const at::Tensor& z_in) {
    check_floating(op, {"z", z_in});
    check_event(op, {"z", z_in});
    z = with_contiguous_events(z_in);
    K = z.size(-1);
    const auto batch = batch_sizes(z);
    grad = check_row_gradient(op, "grad", grad_in, batch, {"z", z});
    grad_z = aten::empty(z.sizes(), z.options());
    rows = map_rows<2>(batch, {row_strides(z, batch), row_strides(grad, batch, 0)});
  }
};

struct GaussianKl : GaussianParameters {
  static constexpr auto op = "gaussian_kl";
  at::Tensor kl;   // [*B]
  RowMap<2> rows;  // operands: mu, logvar

  GaussianKl(const at::Tensor& mu_in, const at::Tensor& logvar_in) : GaussianParameters(op, mu_in, logvar_in) {
    kl = aten::empty(batch, mu.options().dtype(compute_dtype()));
    rows = map_rows<2>(batch, {row_strides(mu, batch), row_strides(logvar, batch)});
  }
};

struct GaussianKlBackward : GaussianParameters {
  static constexpr auto op = "gaussian_kl_backward";
  at::Tensor grad;             // [*B]
  at::Tensor grad_parameters;  // [*B, 2K]: [grad_mu | grad_logvar]
  RowMap<3> rows;              // operands: mu, logvar, grad

  GaussianKlBackward(const at::Tensor& grad_in, const at::Tensor& mu_in, const at::Tensor& logvar_in)
      : GaussianParameters(op, mu_in, logvar_in), grad(check_row_gradient(op, "grad", grad_in, batch, {"mu", mu})) {
    grad_parameters = aten::empty(packed_shape(), mu.options());
    rows = map_rows<3>(batch, {row_strides(mu, batch), row_strides(logvar, batch), row_strides(grad, batch, 0)});
  }
};

}  // namespace wakesleep
