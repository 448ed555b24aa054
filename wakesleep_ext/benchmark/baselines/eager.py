"""Implement the ops and the wake-sleep losses in plain PyTorch, in the fastest form in common use.

`torch.compile` compiles these functions, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LOG_TWO_PI = math.log(2 * math.pi)

Network = Callable[[Tensor], Tensor]


def gaussian_parameters(packed: Tensor) -> tuple[Tensor, Tensor]:
    mu, logvar = packed.chunk(2, -1)
    return mu, logvar


def gaussian_rsample(mu: Tensor, logvar: Tensor, sample_shape: tuple[int, ...] = ()) -> Tensor:
    eps = torch.randn(sample_shape + mu.shape, dtype=mu.dtype, device=mu.device)
    return mu + (0.5 * logvar).exp() * eps


def gaussian_rsample_log_prob(mu: Tensor, logvar: Tensor, sample_shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    eps = torch.randn(sample_shape + mu.shape, dtype=mu.dtype, device=mu.device)
    z = mu + (0.5 * logvar).exp() * eps
    return z, -0.5 * (logvar + eps.square()).sum(-1) - 0.5 * mu.shape[-1] * _LOG_TWO_PI


def gaussian_log_prob(mu: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
    return -0.5 * (logvar + (z - mu).square() * (-logvar).exp()).sum(-1) - 0.5 * mu.shape[-1] * _LOG_TWO_PI


def gaussian_log_prob_sum(mu: Tensor, logvar: Tensor, z: Tensor, sample_weight: Tensor) -> Tensor:
    return (sample_weight * gaussian_log_prob(mu, logvar, z)).sum()


def standard_gaussian_log_prob(z: Tensor) -> Tensor:
    return -0.5 * z.square().sum(-1) - 0.5 * z.shape[-1] * _LOG_TWO_PI


def gaussian_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(-1)


def gaussian_kl_between(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> Tensor:
    log_ratio = logvar - prior_logvar
    return 0.5 * ((mu - prior_mu).square() * (-prior_logvar).exp() + log_ratio.exp() - 1 - log_ratio).sum(-1)


def bernoulli_log_prob(logits: Tensor, x: Tensor) -> Tensor:
    x = x.to(logits.dtype).expand_as(logits)
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)


def bernoulli_sample(logits: Tensor, sample_shape: tuple[int, ...] = (), dtype: torch.dtype | None = None) -> Tensor:
    x = torch.bernoulli(logits.sigmoid().expand(sample_shape + logits.shape))
    return x if dtype is None else x.to(dtype)


def binarize(grey: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.bernoulli(grey / 255).to(dtype)


def linear(h: Tensor, weight: Tensor, bias: Tensor, activation: str | None = None) -> Tensor:
    y = F.linear(h, weight, bias)
    return y if activation is None else getattr(torch, activation)(y)


def mlp(h: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str | None = None) -> Tensor:
    *hidden, last = zip(weights, biases, strict=True)
    for weight, bias in hidden:
        h = linear(h, weight, bias, activation)
    return linear(h, *last)


def linear_bernoulli_log_prob(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return bernoulli_log_prob(_logits(h, weight, bias), x)


def linear_bernoulli_log_prob_sum(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, sample_weight: Tensor) -> Tensor:
    return (sample_weight * linear_bernoulli_log_prob(h, weight, bias, x)).sum()


def linear_bernoulli_sample(h: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    logits = F.linear(h, weight, bias)
    return torch.bernoulli(logits.sigmoid()).to(dtype or logits.dtype)


def linear_gaussian_rsample(h: Tensor, weight: Tensor, bias: Tensor, sample_shape: tuple[int, ...] = ()) -> Tensor:
    mu, logvar = F.linear(h, weight, bias).chunk(2, -1)
    return gaussian_rsample(mu, logvar, sample_shape)


def adam_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: Tensor,
    lr: Tensor,
) -> None:
    """Call the operators of `torch.optim.Adam(foreach=True)`, without the Python code of the optimizer."""
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    torch._foreach_lerp_(exp_avgs, gradients, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, 1 - beta2)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, (1 - beta2**step).sqrt())
    torch._foreach_add_(denominators, eps)
    torch._foreach_div_(denominators, -lr / (1 - beta1**step))
    torch._foreach_addcdiv_(parameters, exp_avgs, denominators)


def wake_loss(recognition: Network, generative: Network, x: Tensor, num_samples: int) -> Tensor:
    """Compute :func:`wakesleep_ext.helmholtz.objectives.wake_theta_loss`."""
    with torch.no_grad():
        mu, logvar = recognition(x).chunk(2, -1)
        z = gaussian_rsample(mu, logvar, (num_samples,))
    logits = generative(z)
    return F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="sum") / (num_samples * len(x))


def sleep_loss(recognition: Network, generative: nn.Module, num_dreams: int, latent: int) -> Tensor:
    """Compute :func:`wakesleep_ext.helmholtz.objectives.sleep_phi_loss`."""
    with torch.no_grad():
        z = torch.randn(num_dreams, latent, device=next(generative.parameters()).device)
        x = bernoulli_sample(generative(z))
    mu, logvar = recognition(x).chunk(2, -1)
    return -gaussian_log_prob(mu, logvar, z).mean()


def _logits(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return logits of at least float32, so that log-likelihoods are not summed in a half type."""
    logits = F.linear(h, weight, bias)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
