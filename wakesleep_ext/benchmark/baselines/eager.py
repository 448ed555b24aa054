"""Implement the ops and the wake-sleep losses in plain PyTorch, in the fastest form in common use.

`torch.compile` compiles these functions, too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LOG_TWO_PI = math.log(2 * math.pi)


def gaussian_rsample(mu: Tensor, logvar: Tensor, sample_shape: tuple[int, ...] = ()) -> Tensor:
    eps = torch.randn(sample_shape + mu.shape, dtype=mu.dtype, device=mu.device)
    return mu + (0.5 * logvar).exp() * eps


def gaussian_rsample_log_prob(mu: Tensor, logvar: Tensor, sample_shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    eps = torch.randn(sample_shape + mu.shape, dtype=mu.dtype, device=mu.device)
    z = mu + (0.5 * logvar).exp() * eps
    return z, -0.5 * (logvar + eps.square()).sum(-1) - 0.5 * mu.shape[-1] * _LOG_TWO_PI


def gaussian_log_prob(mu: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
    return -0.5 * (logvar + (z - mu).square() * (-logvar).exp()).sum(-1) - 0.5 * mu.shape[-1] * _LOG_TWO_PI


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


def wake_loss(recognition: nn.Module, generative: nn.Module, x: Tensor, num_samples: int) -> Tensor:
    """Compute :func:`wakesleep_ext.helmholtz.objectives.wake_theta_loss`."""
    with torch.no_grad():
        mu, logvar = recognition(x).chunk(2, -1)
        z = gaussian_rsample(mu, logvar, (num_samples,))
    logits = generative(z)
    return F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="sum") / (num_samples * len(x))


def sleep_loss(recognition: nn.Module, generative: nn.Module, num_dreams: int, latent: int) -> Tensor:
    """Compute :func:`wakesleep_ext.helmholtz.objectives.sleep_phi_loss`."""
    with torch.no_grad():
        z = torch.randn(num_dreams, latent, device=next(generative.parameters()).device)
        x = bernoulli_sample(generative(z))
    mu, logvar = recognition(x).chunk(2, -1)
    return -gaussian_log_prob(mu, logvar, z).mean()
