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
  at::TensorOptions compute_options() const { return mu.options().dtype(compute_dtype(dtype())); }
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

}  // namespace wakesleep
