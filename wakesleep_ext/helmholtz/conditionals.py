"""Conditional distributions p(value | given): a network, and the fused ops of the distribution that it parameterises.

A conditional is a module; called with what is given it returns a distribution, which draws and scores values. The
layers of a Helmholtz machine are made of these, and see nothing else of each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from wakesleep_ext import ops, random
from wakesleep_ext.helmholtz.networks import MultilayerPerceptron


class Distribution(ABC):
    """Of vectors; one for each of a batch, `[*B]`."""

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """`[*B, K]`."""

    @abstractmethod
    def sample(self, sample_shape: Sequence[int] = (), *, key: Tensor | None = None) -> Tensor:
        """Draws `[*S, *B, K]`: a function of the key, drawn if not given; differentiable where `has_rsample`."""

    @abstractmethod
    def log_prob(self, value: Tensor) -> Tensor:
        """`[*S, *B, K] -> [*S, *B]`, float32 or float64."""

    def sample_log_prob(self, sample_shape: Sequence[int] = (), *, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draws as :meth:`sample`'s, and the log-probability of each."""
        value = self.sample(sample_shape, key=key)
        return value, self.log_prob(value)

    def log_prob_sum(self, value: Tensor, importance: Tensor) -> Tensor:
        """The sum of `importance`, which broadcasts, times :meth:`log_prob`: 0-dimensional."""
        return (importance * self.log_prob(value)).sum()


@dataclass(frozen=True)
class Gaussian(Distribution):
    """N(mu, exp(logvar)), diagonal: `[*B, K]` each."""

    mu: Tensor
    logvar: Tensor

    @property
    def mean(self) -> Tensor:
        return self.mu

    def sample(self, sample_shape: Sequence[int] = (), *, key: Tensor | None = None) -> Tensor:
        return ops.gaussian_rsample(self.mu, self.logvar, sample_shape, key=key)

    def log_prob(self, value: Tensor) -> Tensor:
        return ops.gaussian_log_prob(self.mu, self.logvar, value)

    def sample_log_prob(self, sample_shape: Sequence[int] = (), *, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.gaussian_rsample_log_prob(self.mu, self.logvar, sample_shape, key=key)


@dataclass(frozen=True)
class StandardGaussian(Gaussian):
    """N(0, I): a :class:`Gaussian` whose parameters need not be read."""

    def log_prob(self, value: Tensor) -> Tensor:
        return ops.standard_gaussian_log_prob(value)


@dataclass(frozen=True)
class Bernoulli(Distribution):
    """Independent Bernoulli variables with log-odds `[*B, D]`."""

    logits: Tensor

    @property
    def mean(self) -> Tensor:
        return self.logits.sigmoid()

    def sample(self, sample_shape: Sequence[int] = (), *, key: Tensor | None = None) -> Tensor:
        return ops.bernoulli_sample(self.logits, sample_shape, key=key)

    def log_prob(self, value: Tensor) -> Tensor:
        return ops.bernoulli_log_prob(self.logits, value)


@dataclass(frozen=True)
class LinearBernoulli(Distribution):
    """A :class:`Bernoulli` whose logits are a linear function of h `[*B, H]`, and are never held whole."""

    h: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def logits(self) -> Tensor:
        return nn.functional.linear(self.h, self.weight, self.bias)

    @property
    def mean(self) -> Tensor:
        return self.logits.sigmoid()

    def sample(self, sample_shape: Sequence[int] = (), *, key: Tensor | None = None) -> Tensor:
        key = random.draw_key(self.h) if key is None else key
        if sample_shape:
            return ops.bernoulli_sample(self.logits, sample_shape, key=key)
        return ops.linear_bernoulli_sample(self.h, self.weight, self.bias, key=key)

    def log_prob(self, value: Tensor) -> Tensor:
        return ops.linear_bernoulli_log_prob(self.h, self.weight, self.bias, value)

    def log_prob_sum(self, value: Tensor, importance: Tensor) -> Tensor:
        return ops.linear_bernoulli_log_prob_sum(self.h, self.weight, self.bias, value, importance)


class Conditional(nn.Module):
    """p(value | given): called with what is given, `[*B, J]`, it returns a :class:`Distribution` for each row."""

    has_rsample: ClassVar[bool] = False
    """Whether draws are differentiable, as in `torch.distributions`."""


class GaussianConditional(Conditional):
    """Diagonal Gaussian, its parameters those that a network returns.

    Args:
        network: maps what is given, `[*B, J]`, to `[mu | logvar]` `[*B, 2K]`.
    """

    has_rsample = True

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, given: Tensor) -> Gaussian:
        return Gaussian(*ops.gaussian_parameters(self.network(given)))


class BernoulliConditional(Conditional):
    """Independent Bernoulli variables, their logits those that a network returns.

    Args:
        network: maps what is given, `[*B, J]`, to logits `[*B, D]`.
        hold_logits: keep them rather than compute them whenever they are needed. The many pixels of an image are better
            not kept; latent variables, of which several samples are drawn for each given row, are.
    """

    def __init__(self, network: nn.Module, *, hold_logits: bool = False) -> None:
        super().__init__()
        self.network = network
        self.hold_logits = hold_logits

    def forward(self, given: Tensor) -> Bernoulli | LinearBernoulli:
        network = self.network
        if isinstance(network, MultilayerPerceptron) and network.may_be_fused and not self.hold_logits:
            head = network.head
            return LinearBernoulli(network.features(given), head.weight, head.bias)
        return Bernoulli(network(given))


class StandardGaussianPrior(Conditional):
    """N(0, I), whatever is given.

    Args:
        size: latent variables, K.
    """

    has_rsample = True

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("zeros", torch.zeros(size))
        self.zeros: Tensor

    def forward(self, given: Tensor | None = None) -> StandardGaussian:
        return StandardGaussian(self.zeros, self.zeros)
