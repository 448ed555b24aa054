"""Implement the ops with the classes of :mod:`wakesleep_ext.distributions`, to time these classes."""

from __future__ import annotations

from torch import Tensor
from torch.distributions import kl_divergence

from wakesleep_ext.distributions import BernoulliVector, DiagonalGaussian


def gaussian_rsample(mu: Tensor, logvar: Tensor, sample_shape: tuple[int, ...] = ()) -> Tensor:
    return DiagonalGaussian(mu, logvar, validate_args=False).rsample(sample_shape)


def gaussian_log_prob(mu: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
    return DiagonalGaussian(mu, logvar, validate_args=False).log_prob(z)


def gaussian_kl_between(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> Tensor:
    q = DiagonalGaussian(mu, logvar, validate_args=False)
    return kl_divergence(q, DiagonalGaussian(prior_mu, prior_logvar, validate_args=False))


def bernoulli_log_prob(logits: Tensor, x: Tensor) -> Tensor:
    return BernoulliVector(logits, validate_args=False).log_prob(x)


def bernoulli_sample(logits: Tensor, sample_shape: tuple[int, ...] = ()) -> Tensor:
    return BernoulliVector(logits, validate_args=False).sample(sample_shape)
