// The checked operands that the Gaussian ops share.
#pragma once

#include "../backend.h"
#include "geometry.h"

namespace wakesleep {

// mu and logvar, converted to a common dtype, and the broadcast shape of their leading dimensions.
struct GaussianParameters {
  at::Tensor mu, logvar;  // [*B, K]
  at::DimVector batch;
  int64_t K;

  GaussianParameters(const char* op, const Argument& mu_in, const Argument& logvar_in)
      : mu(mu_in.tensor), logvar(logvar_in.tensor) {
    check_floating(op, mu_in);
    check_floating(op, logvar_in);
    check_same_event(op, mu_in, logvar_in);
    batch = broadcast_batch(op, mu_in, logvar_in);
    K = mu.size(-1);
    promote_to(c10::promoteTypes(mu.scalar_type(), logvar.scalar_type()));
  }

  GaussianParameters(const char* op, const at::Tensor& mu_in, const at::Tensor& logvar_in)
      : GaussianParameters(op, Argument{"mu", mu_in}, Argument{"logvar", logvar_in}) {}

  void promote_to(at::ScalarType dtype) {
    mu = with_contiguous_events(mu.to(dtype));
    logvar = with_contiguous_events(logvar.to(dtype));
  }

  // Returns [*B, 2K]. Both gradients have this shape when they are packed like a network output [mu | logvar].
  at::DimVector packed_shape() const { return concat(batch, {2 * K}); }

  at::ScalarType dtype() const { return mu.scalar_type(); }
  at::TensorOptions compute_options() const { return mu.options().dtype(compute_dtype(dtype())); }
};

// Returns z [*M, *S, *B, K] and, if requested, log_prob [*M, *S, *B].
std::tuple<at::Tensor, at::Tensor> draw_gaussian(const char* op, const at::Tensor& mu,  // [*M, *B, K]
                                                 const at::Tensor& logvar,              // [*M, *B, K]
                                                 const at::Tensor& key,                 // [*M, 2]
                                                 at::IntArrayRef sample_shape, bool with_log_prob);

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
    value_batch = broadcast_batch(op, Batch{"mu and logvar", batch}, batch_of({"z", z}));
  }
};

// The parameters of a Gaussian and of the prior that it is compared with. Their leading dimensions broadcast.
struct GaussianWithPrior : GaussianParameters {
  GaussianParameters prior;
  at::DimVector joint_batch;  // broadcast shape of the leading dimensions of all parameters

  GaussianWithPrior(const char* op, const at::Tensor& mu_in, const at::Tensor& logvar_in, const at::Tensor& prior_mu_in,
                    const at::Tensor& prior_logvar_in)
      : GaussianParameters(op, mu_in, logvar_in),
        prior(op, Argument{"prior_mu", prior_mu_in}, Argument{"prior_logvar", prior_logvar_in}) {
    joint_batch = broadcast_batch(op, Batch{"mu and logvar", batch}, Batch{"prior_mu and prior_logvar", prior.batch});
    check_same_event(op, {"mu", mu}, {"prior_mu", prior.mu});
    const auto common = c10::promoteTypes(dtype(), prior.dtype());
    promote_to(common);
    prior.promote_to(common);
  }
};

}  // namespace wakesleep
