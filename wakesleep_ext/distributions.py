"""The fused ops as `torch.distributions`: a vector as one event, log-probabilities in one pass, draws with a key.

Arguments are validated as torch does, unless told otherwise: `validate_args=False` spares a pass over them. For Pyro
there are the same classes in :mod:`wakesleep_ext.pyro`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints, register_kl
from torch.nn.functional import logsigmoid

from wakesleep_ext import ops

__all__ = ["BernoulliVector", "DiagonalGaussian"]


class DiagonalGaussian(Distribution):
    """N(mu, exp(logvar)), as `Independent(Normal(mu, exp(logvar / 2)), 1)`.

    Args:
        mu: means `[*, K]`.
        logvar: logarithms of the variances `[*, K]`; broadcasts with mu.
        validate_args: whether arguments and values are checked, as in `torch.distributions`.

    Raises:
        TypeError: mu or logvar is no tensor.
        ValueError: mu and logvar are no vectors, do not broadcast, or hold NaN.
    """

    arg_constraints = {"mu": constraints.real_vector, "logvar": constraints.real_vector}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, mu: Tensor, logvar: Tensor, validate_args: bool | None = None) -> None:
        self.mu, self.logvar = mu, logvar
        super().__init__(*_shapes(type(self), mu=mu, logvar=logvar), validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> DiagonalGaussian:
        new = self._get_checked_instance(DiagonalGaussian, _instance)
        shape = torch.Size(batch_shape) + self.event_shape
        new.mu, new.logvar = self.mu.expand(shape), self.logvar.expand(shape)
        return _of_shape(new, batch_shape, self)

    @property
    def mean(self) -> Tensor:
        return self.mu.expand(self._extended_shape())

    @property
    def mode(self) -> Tensor:
        return self.mean

    @property
    def variance(self) -> Tensor:
        return self.logvar.exp().expand(self._extended_shape())

    @property
    def stddev(self) -> Tensor:
        return (self.logvar / 2).exp().expand(self._extended_shape())

    def rsample(
        self,
        sample_shape: Sequence[int] = (),
        *,
        key: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Differentiable draws; see :func:`wakesleep_ext.ops.gaussian_rsample`."""
        return ops.gaussian_rsample(self.mu, self.logvar, sample_shape, key=key, generator=generator)

    def sample(
        self,
        sample_shape: Sequence[int] = (),
        *,
        key: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape, key=key, generator=generator)

    def rsample_log_prob(
        self,
        sample_shape: Sequence[int] = (),
        *,
        key: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draws and their log-densities in one pass; see :func:`wakesleep_ext.ops.gaussian_rsample_log_prob`."""
        return ops.gaussian_rsample_log_prob(self.mu, self.logvar, sample_shape, key=key, generator=generator)

    def log_prob(self, value: Tensor) -> Tensor:
        """float32 for half types; see :func:`wakesleep_ext.ops.gaussian_log_prob`."""
        if self._validate_args:
            self._validate_sample(value)
        return ops.gaussian_log_prob(self.mu, self.logvar, value)

    def entropy(self) -> Tensor:
        """float32 for half types, as are divergences."""
        entropy = _widened(self.logvar).sum(-1) / 2 + self.event_shape[0] * (1 + math.log(2 * math.pi)) / 2
        return entropy.expand(self.batch_shape)


class BernoulliVector(Distribution):
    """Independent zeros and ones, as `Independent(Bernoulli(logits=logits), 1)`.

    Args:
        logits: log-odds `[*, D]`.
        validate_args: whether arguments and values are checked, as in `torch.distributions`.

    Raises:
        TypeError: the logits are no tensor.
        ValueError: the logits are no vectors, or hold NaN.
    """

    arg_constraints = {"logits": constraints.real_vector}  # noqa: RUF012
    support = constraints.independent(constraints.boolean, 1)

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(*_shapes(type(self), logits=logits), validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> BernoulliVector:
        new = self._get_checked_instance(BernoulliVector, _instance)
        new.logits = self.logits.expand(torch.Size(batch_shape) + self.event_shape)
        return _of_shape(new, batch_shape, self)

    @property
    def probs(self) -> Tensor:
        return self.logits.sigmoid()

    @property
    def mean(self) -> Tensor:
        return self.probs

    @property
    def mode(self) -> Tensor:
        return (self.logits > 0).to(self.logits.dtype)

    @property
    def variance(self) -> Tensor:
        return self.probs * (-self.logits).sigmoid()

    def sample(
        self,
        sample_shape: Sequence[int] = (),
        *,
        key: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws in the dtype of the logits; see :func:`wakesleep_ext.ops.bernoulli_sample`."""
        return ops.bernoulli_sample(self.logits, sample_shape, key=key, generator=generator)

    def log_prob(self, value: Tensor) -> Tensor:
        """float32 for half types, of a value of any dtype; see :func:`wakesleep_ext.ops.bernoulli_log_prob`."""
        if self._validate_args:
            self._validate_sample(value)
        return ops.bernoulli_log_prob(self.logits, value)

    def entropy(self) -> Tensor:
        """float32 for half types, as are divergences."""
        logits = _widened(self.logits)
        return -ops.bernoulli_log_prob(logits, logits.sigmoid())


@register_kl(DiagonalGaussian, DiagonalGaussian)
def _kl_gaussian_gaussian(p: DiagonalGaussian, q: DiagonalGaussian) -> Tensor:
    """Measured in units of q, the divergence is that from N(0, I)."""
    logvar = _widened(q.logvar)
    return ops.gaussian_kl((_widened(p.mu) - q.mu) * (-logvar / 2).exp(), p.logvar - logvar)


@register_kl(BernoulliVector, BernoulliVector)
def _kl_bernoulli_bernoulli(p: BernoulliVector, q: BernoulliVector) -> Tensor:
    """Sums over both outcomes, each of which keeps its precision where the other is nearly certain."""
    a, b = _widened(p.logits), _widened(q.logits)
    one, zero = logsigmoid(a) - logsigmoid(b), logsigmoid(-a) - logsigmoid(-b)
    return (a.sigmoid() * one + (-a).sigmoid() * zero).sum(-1)


def _shapes(kind: type[Distribution], **parameters: Tensor) -> tuple[torch.Size, torch.Size]:
    """Batch and event shape."""
    for name, parameter in parameters.items():
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{kind.__name__}: expected {name} to be a tensor, got {type(parameter).__name__}")
        if parameter.dim() == 0:
            raise ValueError(f"{kind.__name__}: expected {name} to have one dimension at least, got a scalar")
    try:
        # a fifth of the time of torch.broadcast_shapes, which is written in Python
        shape = torch.broadcast_tensors(*parameters.values())[0].shape
    except RuntimeError as error:
        names, shapes = " and ".join(parameters), [list(parameter.shape) for parameter in parameters.values()]
        raise ValueError(f"{kind.__name__}: expected {names} to broadcast, got {shapes}") from error
    return shape[:-1], shape[-1:]


def _widened(parameter: Tensor) -> Tensor:
    """In the type of log-probabilities."""
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


def _of_shape(new: Any, batch_shape: Sequence[int], old: Distribution) -> Any:
    """As `Distribution.expand` is to be written: nothing is validated anew."""
    Distribution.__init__(new, torch.Size(batch_shape), old.event_shape, validate_args=False)
    new._validate_args = old._validate_args
    return new
