"""Lightweight Gaussian and Bernoulli distributions of vectors, computed by the fused ops.

The heads of :mod:`wakesleep_ext.modules` and the conditionals of :mod:`wakesleep_ext.helmholtz.conditionals` return
these classes. An object only stores its parameters and does not validate them, because constructing a
`torch.distributions` object takes longer than running the op. :mod:`wakesleep_ext.distributions` provides the same
distributions as `torch.distributions` classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from wakesleep_ext import ops, random

Family = Literal["gaussian", "bernoulli"]


class Distribution(ABC):
    """A distribution of vectors for each element of a batch `[*B]`."""

    family: ClassVar[Family | None] = None
    """Selects the transition kernel for annealed importance sampling; None if AIS is not supported."""
    is_fixed: ClassVar[bool] = False
    """True if the distribution has no trainable parameters, so that a loss may omit its log-probability."""

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """The mean, `[*B, K]`."""

    @property
    def log_variance(self) -> Tensor:
        """The logarithm of each element's variance, `[*B, K]`."""
        raise NotImplementedError(f"{type(self).__name__} has no log_variance")

    @abstractmethod
    def rsample(self, sample_shape: Sequence[int] = (), *, key: Tensor | None = None) -> Tensor:
        """Draw samples `[*S, *B, K]`. If `key` is None, a new key is drawn.

        Gaussian samples pass gradients to the parameters; Bernoulli samples do not.
        """

    @abstractmethod
    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability, `[*S, *B, K] -> [*S, *B]`, float32 or float64."""

    def rsample_log_prob(self, sample_shape: Sequence[int] = (), *, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draw samples as :meth:`rsample` does, and return them with their log-probabilities."""
        value = self.rsample(sample_shape, key=key)
        return value, self.log_prob(value)

    def log_prob_sum(self, value: Tensor, sample_weight: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        """Return `scale` times the 0-dimensional sum of :meth:`log_prob`.

        The sum is weighted by `sample_weight` (broadcast, 1 by default).
        """
        log_prob = self.log_prob(value)
        total = (log_prob if sample_weight is None else sample_weight * log_prob).sum()
        return total if scale == 1 else scale * total

    def kl_from(self, q: Distribution) -> Tensor | None:
        """Return KL(q || self), `[*B]`, or None if it has no closed form."""
        return None

    def kl_to_standard_gaussian(self) -> Tensor | None:
        """Return KL(self || N(0, I)), `[*B]`, or None if it has no closed form."""
        return None


@dataclass(frozen=True)
class Gaussian(Distribution):
    """A diagonal Gaussian N(mu, exp(logvar)), with parameters `[*B, K]`."""

    family = "gaussian"

    mu: Tensor
    logvar: Tensor

    @classmethod
    def from_packed(cls, parameters: Tensor) -> Gaussian:
        """Use packed `[mu | logvar]`, `[*B, 2K]`, without a copy; see :func:`wakesleep_ext.ops.gaussian_parameters`."""
        return cls(*ops.gaussian_parameters(parameters))

    @property
    def mean(self) -> Tensor:
        return self.mu

    @property
    def log_variance(self) -> Tensor:
        return self.logvar

    def rsample(self, sample_shape: Sequence[int] = (), *, key: Tensor | None = None) -> Tensor:
        return ops.gaussian_rsample(self.mu, self.logvar, sample_shape, key=key)

    def from_noise(self, noise: Tensor) -> Tensor:
        """Transform samples of N(0, I) into samples of this Gaussian, both `[*S, *B, K]`."""
        return self.mu + torch.exp(self.logvar / 2) * noise

    def log_prob(self, value: Tensor) -> Tensor:
        return ops.gaussian_log_prob(self.mu, self.logvar, value)

    def log_prob_sum(self, value: Tensor, sample_weight: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        """Return the weighted sum as in the base class. The forward pass also computes the gradients."""
        return ops.gaussian_log_prob_sum(self.mu, self.logvar, value, sample_weight, scale=scale)

    def rsample_log_prob(self, sample_shape: Sequence[int] = (), *, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.gaussian_rsample_log_prob(self.mu, self.logvar, sample_shape, key=key)

    def kl_to_standard_gaussian(self) -> Tensor:
        return ops.gaussian_kl(self.mu, self.logvar)


@dataclass(frozen=True)
class StandardGaussian(Gaussian):
    """N(0, I): a :class:`Gaussian` that computes its density without reading the parameters."""

    is_fixed = True

    def log_prob(self, value: Tensor) -> Tensor:
        return ops.standard_gaussian_log_prob(value)

    log_prob_sum = Distribution.log_prob_sum

    def kl_from(self, q: Distribution) -> Tensor | None:
        return q.kl_to_standard_gaussian()


@dataclass(frozen=True)
class Bernoulli(Distribution):
    """Independent Bernoulli variables with log-odds `[*B, D]`."""

    family = "bernoulli"

    logits: Tensor

    @property
    def mean(self) -> Tensor:
        return self.logits.sigmoid()

    @property
    def log_variance(self) -> Tensor:
        return nn.functional.logsigmoid(self.logits) + nn.functional.logsigmoid(-self.logits)

    def rsample(self, sample_shape: Sequence[int] = (), *, key: Tensor | None = None) -> Tensor:
        return ops.bernoulli_sample(self.logits, sample_shape, key=key)

    def log_prob(self, value: Tensor) -> Tensor:
        return ops.bernoulli_log_prob(self.logits, value)


@dataclass(frozen=True)
class LinearBernoulli(Distribution):
    """A :class:`Bernoulli` whose logits are a linear function of h `[*B, H]`, computed by the fused head ops."""

    family = "bernoulli"

    h: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def logits(self) -> Tensor:
        return nn.functional.linear(self.h, self.weight, self.bias)

    @property
    def mean(self) -> Tensor:
        return self.logits.sigmoid()

    def rsample(self, sample_shape: Sequence[int] = (), *, key: Tensor | None = None) -> Tensor:
        key = random.draw_key(self.h) if key is None else key
        if sample_shape:
            return ops.bernoulli_sample(self.logits, sample_shape, key=key)
        return ops.linear_bernoulli_sample(self.h, self.weight, self.bias, key=key)

    def log_prob(self, value: Tensor, *, recompute: bool | None = None) -> Tensor:
        """Return the log-probability, `[*S, *B, D] -> [*S, *B]`.

        See :func:`wakesleep_ext.ops.linear_bernoulli_log_prob` for `recompute`.
        """
        return ops.linear_bernoulli_log_prob(self.h, self.weight, self.bias, value, recompute=recompute)

    def log_prob_sum(self, value: Tensor, sample_weight: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        """Return the weighted sum as in the base class. The forward pass also computes the gradients."""
        return ops.linear_bernoulli_log_prob_sum(self.h, self.weight, self.bias, value, sample_weight, scale=scale)
