"""Implement the ops and the wake-sleep losses with torch.distributions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal, kl_divergence


def gaussian_rsample(mu: Tensor, logvar: Tensor, sample_shape: tuple[int, ...] = ()) -> Tensor:
    return _gaussian(mu, logvar).rsample(torch.Size(sample_shape))


def gaussian_rsample_log_prob(mu: Tensor, logvar: Tensor, sample_shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    q = _gaussian(mu, logvar)
    z = q.rsample(torch.Size(sample_shape))
    return z, q.log_prob(z)


def gaussian_log_prob(mu: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
    return _gaussian(mu, logvar).log_prob(z)


def standard_gaussian_log_prob(z: Tensor) -> Tensor:
    return Normal(0.0, 1.0, validate_args=False).log_prob(z).sum(-1)


def gaussian_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    q = Normal(mu, (0.5 * logvar).exp(), validate_args=False)
    return kl_divergence(q, Normal(0.0, 1.0, validate_args=False)).sum(-1)


def gaussian_kl_between(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> Tensor:
    return kl_divergence(_gaussian(mu, logvar), _gaussian(prior_mu, prior_logvar))


def bernoulli_log_prob(logits: Tensor, x: Tensor) -> Tensor:
    return _bernoulli(logits).log_prob(x.to(logits.dtype))


def bernoulli_sample(logits: Tensor, sample_shape: tuple[int, ...] = (), dtype: torch.dtype | None = None) -> Tensor:
    x = _bernoulli(logits).sample(torch.Size(sample_shape))
    return x if dtype is None else x.to(dtype)


def wake_loss(recognition: nn.Module, generative: nn.Module, x: Tensor, num_samples: int) -> Tensor:
    """Compute :func:`wakesleep_ext.helmholtz.objectives.wake_theta_loss`."""
    with torch.no_grad():
        mu, logvar = recognition(x).chunk(2, -1)
        z = _gaussian(mu, logvar).sample(torch.Size((num_samples,)))
    return -_bernoulli(generative(z)).log_prob(x).mean()


def sleep_loss(recognition: nn.Module, generative: nn.Module, num_dreams: int, latent: int) -> Tensor:
    """Compute :func:`wakesleep_ext.helmholtz.objectives.sleep_phi_loss`."""
    with torch.no_grad():
        mean = torch.zeros(num_dreams, latent, device=next(generative.parameters()).device)
        z = Normal(mean, 1.0, validate_args=False).sample()
        x = _bernoulli(generative(z)).sample()
    mu, logvar = recognition(x).chunk(2, -1)
    return -_gaussian(mu, logvar).log_prob(z).mean()


def _gaussian(mu: Tensor, logvar: Tensor) -> Distribution:
    return Independent(Normal(mu, (0.5 * logvar).exp(), validate_args=False), 1, validate_args=False)


def _bernoulli(logits: Tensor) -> Distribution:
    return Independent(Bernoulli(logits=logits, validate_args=False), 1, validate_args=False)
