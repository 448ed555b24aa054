"""Reference implementations of every op in plain torch.

The functions have the signatures of :mod:`wakesleep_ext.ops`. They are differentiable to any order, and run on any
device and in float64. Tests compare the kernels with these functions, and benchmarks use the functions as a baseline.
You can also call them on devices for which there are no kernels. Half types are computed in float32, as in the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from wakesleep_ext import random

_LOG_TWO_PI = math.log(2 * math.pi)


def gaussian_parameters(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Split a packed [mu | logvar]."""
    mu, logvar = packed.chunk(2, -1)
    return mu, logvar


def gaussian_rsample(
    mu: Tensor,
    logvar: Tensor,
    sample_shape: Sequence[int] = (),
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return mu + exp(logvar / 2) eps."""
    mu, logvar = _promote(mu, logvar)
    eps = _standard_normals(mu, logvar, sample_shape, key, generator)
    return (_compute(mu) + (0.5 * _compute(logvar)).exp() * eps).to(mu.dtype)


def gaussian_rsample_log_prob(
    mu: Tensor,
    logvar: Tensor,
    sample_shape: Sequence[int] = (),
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (z, log q(z)). log q is computed from eps, not from the rounded z."""
    mu, logvar = _promote(mu, logvar)
    eps = _standard_normals(mu, logvar, sample_shape, key, generator)
    mu_, logvar_ = torch.broadcast_tensors(_compute(mu), _compute(logvar))
    z = (mu_ + (0.5 * logvar_).exp() * eps).to(mu.dtype)
    return z, -0.5 * (logvar_ + eps.square() + _LOG_TWO_PI).sum(-1)


def gaussian_log_prob(mu: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
    """Return -1/2 sum [logvar + (z - mu)^2 exp(-logvar) + log 2 pi]."""
    mu, logvar, z = map(_compute, _promote(mu, logvar, z))
    return -0.5 * (logvar + (z - mu).square() * (-logvar).exp() + _LOG_TWO_PI).sum(-1)


def standard_gaussian_log_prob(z: Tensor) -> Tensor:
    """Return -1/2 sum [z^2 + log 2 pi]."""
    return -0.5 * (_compute(z).square() + _LOG_TWO_PI).sum(-1)


def gaussian_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """Return 1/2 sum [mu^2 + exp(logvar) - 1 - logvar]."""
    mu, logvar = map(_compute, _promote(mu, logvar))
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(-1)


def gaussian_kl_between(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> Tensor:
    """Return 1/2 sum [(mu - prior_mu)^2 exp(-prior_logvar) + exp(d) - 1 - d], where d = logvar - prior_logvar."""
    mu, logvar, prior_mu, prior_logvar = map(_compute, _promote(mu, logvar, prior_mu, prior_logvar))
    d = logvar - prior_logvar
    return 0.5 * ((mu - prior_mu).square() * (-prior_logvar).exp() + d.exp() - 1 - d).sum(-1)


def bernoulli_log_prob(logits: Tensor, x: Tensor) -> Tensor:
    """Return sum [x logits - softplus(logits)]."""
    logits = _compute(logits)
    # softplus(a) = -logsigmoid(-a); torch's softplus returns its input unchanged if a > 20
    return (x.to(logits.dtype) * logits + F.logsigmoid(-logits)).sum(-1)


def bernoulli_sample(
    logits: Tensor,
    sample_shape: Sequence[int] = (),
    *,
    dtype: torch.dtype | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return 1 where u <= sigmoid(logits), else 0."""
    key = random.draw_key(logits, generator) if key is None else key
    shape = torch.Size(sample_shape) + logits.shape
    u = random.uniforms(key, shape, _compute(logits).dtype)
    return (u <= _compute(logits).sigmoid()).to(dtype or logits.dtype)


def binarize(
    grey: Tensor,
    white: int = 255,
    index: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return 1 where u <= grey / white, else 0."""
    key = random.draw_key(grey, generator) if key is None else key
    p = (grey if index is None else grey[index]).float() / white
    return (random.uniforms(key, p.shape) <= p).to(dtype or torch.uint8)


def linear(h: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    """Return f(h weight^T + bias)."""
    dtype = _promote(h, weight)[0].dtype
    output = _linear(h, weight, bias)
    return (output if activation is None else getattr(torch, activation)(output)).to(dtype)


def mlp(
    h: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: str | None = None,
    output_activation: str | None = None,
) -> Tensor:
    """Apply :func:`linear` once per layer."""
    *hidden, last = zip(weights, biases, strict=True)
    for weight, bias in hidden:
        h = linear(h, weight, bias, activation)
    return linear(h, *last, output_activation)


def linear_bernoulli_log_prob(
    h: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, *, recompute: bool | None = None
) -> Tensor:
    """Return bernoulli_log_prob of h weight^T + bias."""
    return bernoulli_log_prob(_linear(h, weight, bias), x)


def gaussian_log_prob_sum(
    mu: Tensor, logvar: Tensor, z: Tensor, sample_weight: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    """Return scale * sum [sample_weight * gaussian_log_prob]."""
    return _weighted_sum(gaussian_log_prob(mu, logvar, z), sample_weight, scale)


def linear_bernoulli_log_prob_sum(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    sample_weight: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> Tensor:
    """Return scale * sum [sample_weight * linear_bernoulli_log_prob]."""
    return _weighted_sum(linear_bernoulli_log_prob(h, weight, bias, x), sample_weight, scale)


def _weighted_sum(log_prob: Tensor, sample_weight: Tensor | None, scale: float) -> Tensor:
    return scale * (log_prob if sample_weight is None else sample_weight.to(log_prob.dtype) * log_prob).sum()


def linear_bernoulli_sample(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    dtype: torch.dtype | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return bernoulli_sample of h weight^T + bias."""
    result_dtype = dtype or _promote(h, weight)[0].dtype
    return bernoulli_sample(_linear(h, weight, bias), dtype=result_dtype, key=key, generator=generator)


def linear_gaussian_rsample(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sample_shape: Sequence[int] = (),
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return gaussian_rsample of the two halves of h weight^T + bias."""
    mu, logvar = gaussian_parameters(linear(h, weight, bias))
    return gaussian_rsample(mu, logvar, sample_shape, key=key, generator=generator)


@torch.no_grad()
def adam_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    lr: Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> None:
    """Update m and v from the gradient, then subtract lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) from p."""
    t = step.double()
    for p, g, m, v in zip(parameters, gradients, exp_avgs, exp_avg_sqs, strict=True):
        g, new_m, new_v = map(_compute, (g, m, v))
        new_m, new_v = beta1 * new_m + (1 - beta1) * g, beta2 * new_v + (1 - beta2) * g.square()
        m_hat, v_hat = new_m / (1 - beta1**t), new_v / (1 - beta2**t)
        p.copy_(_compute(p) - lr * m_hat / (v_hat.sqrt() + eps))
        m.copy_(new_m)
        v.copy_(new_v)


def _linear(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    h, weight = map(_compute, _promote(h, weight))
    return F.linear(h, weight, None if bias is None else _compute(bias).to(h.dtype))


def _standard_normals(
    mu: Tensor,
    logvar: Tensor,
    sample_shape: Sequence[int],
    key: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:
    key = random.draw_key(mu, generator) if key is None else key
    shape = torch.Size(sample_shape) + torch.broadcast_shapes(mu.shape, logvar.shape)
    return random.standard_normals(key, shape, _compute(mu).dtype)


def _promote(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _compute(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
