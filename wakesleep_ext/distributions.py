"""Gaussian and Bernoulli vectors as `torch.distributions` classes, computed by the fused ops.

The last dimension is the event. A log-probability takes one pass over memory, and a key determines each draw.
Arguments are validated as in torch; `validate_args=False` saves a pass over them. :mod:`wakesleep_ext.pyro` contains
the same classes for Pyro.

`torch.distributions.kl_divergence` is exact between two of these classes. It is also exact between one of them and the
following torch distributions, if the event shapes agree:

- `Independent(Normal(...), 1)`, `Independent(Bernoulli(...), 1)` and `MultivariateNormal`;
- any other `Independent`, if torch has a KL divergence between its base and a `Normal` or a `Bernoulli`.

A plain `Normal` or `Bernoulli` is a batch of scalars. `kl_divergence` raises `NotImplementedError` for a batch of
scalars: wrap the distribution in `Independent`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    constraints,
    kl_divergence,
    register_kl,
)
from torch.distributions.utils import probs_to_logits
from torch.nn.functional import logsigmoid

from wakesleep_ext import ops

__all__ = ["BernoulliVector", "DiagonalGaussian"]


class DiagonalGaussian(Distribution):
    """N(mu, exp(logvar)), equivalent to `Independent(Normal(mu, exp(logvar / 2)), 1)`.

    Args:
        mu: means `[*, K]`.
        logvar: log-variances `[*, K]`; they broadcast with mu.
        validate_args: whether to check arguments and values, as in `torch.distributions`.
        scale: standard deviations `[*, K]`, a keyword argument that replaces logvar; they broadcast with mu.

    Raises:
        TypeError: mu, logvar or scale is not a tensor.
        ValueError: both or neither of logvar and scale are given; a parameter is 0-dimensional or contains NaN; the
            parameters do not broadcast; a scale is not positive.

    If the last dimension of a parameter has size 1, the distribution stores it expanded to K, as a view. Leading
    dimensions are stored unchanged, because the ops broadcast them.
    """

    arg_constraints = {"mu": constraints.real_vector, "logvar": constraints.real_vector}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        mu: Tensor,
        logvar: Tensor | None = None,
        validate_args: bool | None = None,
        *,
        scale: Tensor | None = None,
    ) -> None:
        name, spread = _only_one(type(self), logvar=logvar, scale=scale)
        batch_shape, event_shape = _shapes(type(self), **{"mu": mu, name: spread})
        if name == "scale":
            _check(self, "scale", spread, constraints.positive, validate_args)
            spread = 2 * spread.log()
        self.mu, self.logvar = _with_event(mu, event_shape), _with_event(spread, event_shape)
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

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

    @property
    def scale(self) -> Tensor:
        """The standard deviations; an alias of `stddev`, named like the constructor's argument."""
        return self.stddev

    def rsample(
        self,
        sample_shape: Sequence[int] = (),
        *,
        key: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw differentiable samples; see :func:`wakesleep_ext.ops.gaussian_rsample`."""
        return ops.gaussian_rsample(self.mu, self.logvar, sample_shape, key=key, generator=generator)

    def sample(
        self,
        sample_shape: Sequence[int] = (),
        *,
        key: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw samples without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape, key=key, generator=generator)

    def rsample_log_prob(
        self,
        sample_shape: Sequence[int] = (),
        *,
        key: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw samples and their log-densities in one pass; see :func:`wakesleep_ext.ops.gaussian_rsample_log_prob`."""
        return ops.gaussian_rsample_log_prob(self.mu, self.logvar, sample_shape, key=key, generator=generator)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density, in float32 for half types; see :func:`wakesleep_ext.ops.gaussian_log_prob`."""
        if self._validate_args:
            self._validate_sample(value)
        return ops.gaussian_log_prob(self.mu, self.logvar, value)

    def entropy(self) -> Tensor:
        """Return the entropy, in float32 for half types."""
        entropy = _widened(self.logvar).sum(-1) / 2 + self.event_shape[0] * (1 + math.log(2 * math.pi)) / 2
        return entropy.expand(self.batch_shape)


class BernoulliVector(Distribution):
    """Independent binary variables, equivalent to `Independent(Bernoulli(logits=logits), 1)`.

    Args:
        logits: log-odds `[*, D]`. They must be finite: infinite logits give NaN.
        validate_args: whether to check arguments and values, as in `torch.distributions`.
        probs: probability that each variable is 1, `[*, D]`: a keyword argument that replaces logits. As in torch's
            `Bernoulli`, they are clamped to `[eps, 1 - eps]`, with the eps of their dtype. So probabilities of 0 and 1
            give finite log-probabilities and gradients.

    Raises:
        TypeError: logits or probs is not a tensor.
        ValueError: both or neither of logits and probs are given; the parameter is 0-dimensional or contains NaN; a
            probability is outside `[0, 1]`.
    """

    arg_constraints = {"logits": constraints.real_vector}  # noqa: RUF012
    support = constraints.independent(constraints.boolean, 1)

    def __init__(
        self, logits: Tensor | None = None, validate_args: bool | None = None, *, probs: Tensor | None = None
    ) -> None:
        name, chances = _only_one(type(self), logits=logits, probs=probs)
        shapes = _shapes(type(self), **{name: chances})
        if name == "probs":
            _check(self, "probs", chances, constraints.unit_interval, validate_args)
            chances = probs_to_logits(chances, is_binary=True)
        self.logits = chances
        super().__init__(*shapes, validate_args=validate_args)

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
        """Draw samples in the dtype of the logits; see :func:`wakesleep_ext.ops.bernoulli_sample`."""
        return ops.bernoulli_sample(self.logits, sample_shape, key=key, generator=generator)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability, in float32 for logits of half types. The value may have any dtype.

        See :func:`wakesleep_ext.ops.bernoulli_log_prob`.
        """
        if self._validate_args:
            self._validate_sample(value)
        return ops.bernoulli_log_prob(self.logits, value)

    def entropy(self) -> Tensor:
        """Return the entropy, in float32 for half types."""
        logits = _widened(self.logits)
        return -ops.bernoulli_log_prob(logits, logits.sigmoid())


@register_kl(DiagonalGaussian, DiagonalGaussian)
def _kl_gaussian_gaussian(p: DiagonalGaussian, q: DiagonalGaussian) -> Tensor:
    """Return the divergence, in float32 for half types; see :func:`wakesleep_ext.ops.gaussian_kl_between`."""
    _check_events(p, q)
    return ops.gaussian_kl_between(p.mu, p.logvar, q.mu, q.logvar)


@register_kl(BernoulliVector, BernoulliVector)
def _kl_bernoulli_bernoulli(p: BernoulliVector, q: BernoulliVector) -> Tensor:
    """Sum the KL terms of both outcomes. Each term stays accurate even if the other outcome is nearly certain."""
    _check_events(p, q)
    a, b = _widened(p.logits), _widened(q.logits)
    one, zero = logsigmoid(a) - logsigmoid(b), logsigmoid(-a) - logsigmoid(-b)
    return (a.sigmoid() * one + (-a).sigmoid() * zero).sum(-1)


@register_kl(DiagonalGaussian, Independent)
def _kl_gaussian_independent(p: DiagonalGaussian, q: Independent[Any]) -> Tensor:
    """Use the fused op if the base of q is a Normal, otherwise torch's KL between a Normal and the base of q."""
    if q.reinterpreted_batch_ndims == 0:
        return kl_divergence(p, q.base_dist)
    _check_events(p, q)
    if isinstance(q.base_dist, Normal):
        return _kl_gaussian_gaussian(p, _as_gaussian(q.base_dist))
    return kl_divergence(_independent_normal(p), q)


@register_kl(Independent, DiagonalGaussian)
def _kl_independent_gaussian(p: Independent[Any], q: DiagonalGaussian) -> Tensor:
    if p.reinterpreted_batch_ndims == 0:
        return kl_divergence(p.base_dist, q)
    _check_events(p, q)
    if isinstance(p.base_dist, Normal):
        return _kl_gaussian_gaussian(_as_gaussian(p.base_dist), q)
    return kl_divergence(p, _independent_normal(q))


@register_kl(DiagonalGaussian, LowRankMultivariateNormal)
@register_kl(DiagonalGaussian, MultivariateNormal)
def _kl_gaussian_multivariate(p: DiagonalGaussian, q: Distribution) -> Tensor:
    _check_events(p, q)
    return kl_divergence(_multivariate_normal(p, q), q)


@register_kl(LowRankMultivariateNormal, DiagonalGaussian)
@register_kl(MultivariateNormal, DiagonalGaussian)
def _kl_multivariate_gaussian(p: Distribution, q: DiagonalGaussian) -> Tensor:
    _check_events(p, q)
    return kl_divergence(p, _multivariate_normal(q, p))


@register_kl(BernoulliVector, Independent)
def _kl_bernoulli_independent(p: BernoulliVector, q: Independent[Any]) -> Tensor:
    """Return infinity if q gives probability 0 to an outcome that p allows, because a probability of q is 0 or 1."""
    if q.reinterpreted_batch_ndims == 0:
        return kl_divergence(p, q.base_dist)
    _check_events(p, q)
    if not isinstance(q.base_dist, Bernoulli):
        return kl_divergence(_independent_bernoulli(p), q)
    divergence = _kl_bernoulli_bernoulli(p, BernoulliVector(q.base_dist.logits, validate_args=False))
    ruled_out = _ruled_out(q.base_dist, p.logits)
    return divergence if ruled_out is None else divergence.masked_fill(ruled_out.any(-1), math.inf)


@register_kl(Independent, BernoulliVector)
def _kl_independent_bernoulli(p: Independent[Any], q: BernoulliVector) -> Tensor:
    if p.reinterpreted_batch_ndims == 0:
        return kl_divergence(p.base_dist, q)
    _check_events(p, q)
    if isinstance(p.base_dist, Bernoulli):
        return _kl_bernoulli_bernoulli(BernoulliVector(p.base_dist.logits, validate_args=False), q)
    return kl_divergence(p, _independent_bernoulli(q))


@register_kl(DiagonalGaussian, Normal)
@register_kl(Normal, DiagonalGaussian)
@register_kl(BernoulliVector, Bernoulli)
@register_kl(Bernoulli, BernoulliVector)
def _kl_vector_numbers(p: Distribution, q: Distribution) -> None:
    """Raise an error that suggests `Independent`: one argument is a vector, the other a batch of scalars."""
    _check_events(p, q)


def _as_gaussian(normal: Normal) -> DiagonalGaussian:
    return DiagonalGaussian(normal.loc, 2 * normal.scale.log(), validate_args=False)


def _independent_normal(gaussian: DiagonalGaussian) -> Independent[Normal]:
    mean, stddev = _widened(gaussian.mean), (_widened(gaussian.logvar) / 2).exp()
    return Independent(Normal(mean, stddev, validate_args=False), 1)


def _independent_bernoulli(vector: BernoulliVector) -> Independent[Bernoulli]:
    return Independent(Bernoulli(logits=_widened(vector.logits), validate_args=False), 1)


def _multivariate_normal(gaussian: DiagonalGaussian, other: Distribution) -> MultivariateNormal:
    """Return a `MultivariateNormal` in the dtype of `other`: torch's KL divergence does not promote dtypes."""
    mean, stddev = gaussian.mean.to(other.mean.dtype), gaussian.stddev.to(other.mean.dtype)
    return MultivariateNormal(mean, scale_tril=stddev.diag_embed(), validate_args=False)


def _ruled_out(q: Bernoulli, logits: Tensor) -> Tensor | None:
    """Return a mask of dimensions where q gives probability 0 to an outcome that a variable with `logits` can take.

    If q was built from a probability of 0 or 1, torch clamps the logit. Such a clamped logit must be distinguished from
    an exact logit whose sigmoid rounds to 0 or 1. The absolute value of such an exact logit exceeds the clamp by at
    least log(4). An element of `logits` that is at least as extreme as q's clamped logit may itself come from a
    probability of 0 or 1. The mask is False there: the variable is assumed never to take the outcome that q excludes.
    """
    if "probs" not in q.__dict__:
        return None
    is_certain = (q.probs == 0) | (q.probs == 1)
    is_clamped = q.logits.abs() < 0.5 - math.log(torch.finfo(q.logits.dtype).eps)
    less_certain = torch.where(q.probs == 1, logits < q.logits, logits > q.logits)
    return is_certain & is_clamped & less_certain


def _only_one(kind: type[Distribution], **parameters: Tensor | None) -> tuple[str, Tensor]:
    """Return the name and value of the only parameter that is not None."""
    given = [(name, parameter) for name, parameter in parameters.items() if parameter is not None]
    if len(given) != 1:
        raise ValueError(
            f"{kind.__name__}: expected either {' or '.join(parameters)}, got {'both' if given else 'neither'}"
        )
    return given[0]


def _check(
    distribution: Distribution, name: str, value: Tensor, constraint: constraints.Constraint, asked: bool | None
) -> None:
    """If arguments are validated, raise an error for values that violate the constraint."""
    wanted = distribution._validate_args if asked is None else asked
    if wanted and not torch._is_all_true(constraint.check(value)):
        raise ValueError(
            f"{type(distribution).__name__}: expected parameter {name} to satisfy {constraint}, got values that do not:"
            f"\n{value}"
        )


def _check_events(p: Distribution, q: Distribution) -> None:
    """Raise an error if the event shapes differ: broadcasting them would give a wrong result."""
    if p.event_shape == q.event_shape:
        return
    shapes = f"got {list(p.event_shape)} for {type(p).__name__} and {list(q.event_shape)} for {type(q).__name__}"
    message = f"kl_divergence: expected distributions with the same event shape, {shapes}"
    if len(p.event_shape) == len(q.event_shape):
        raise ValueError(message)
    raise NotImplementedError(f"{message}. Independent(distribution, 1) makes the last batch dimension the event")


def _with_event(parameter: Tensor, event_shape: torch.Size) -> Tensor:
    """Return the parameter itself if its last dimension matches the event shape, otherwise an expanded view."""
    shape = parameter.shape[:-1] + event_shape
    return parameter if parameter.shape == shape else parameter.expand(shape)


def _shapes(kind: type[Distribution], **parameters: Tensor) -> tuple[torch.Size, torch.Size]:
    """Return the batch shape and the event shape."""
    for name, parameter in parameters.items():
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{kind.__name__}: expected {name} to be a tensor, got {type(parameter).__name__}")
        if parameter.dim() == 0:
            raise ValueError(f"{kind.__name__}: expected {name} to have at least one dimension, got a scalar")
    try:
        # five times as fast as torch.broadcast_shapes, which is written in Python
        shape = torch.broadcast_tensors(*parameters.values())[0].shape
    except RuntimeError as error:
        names, shapes = " and ".join(parameters), [list(parameter.shape) for parameter in parameters.values()]
        raise ValueError(f"{kind.__name__}: expected {names} to broadcast, got {shapes}") from error
    return shape[:-1], shape[-1:]


def _widened(parameter: Tensor) -> Tensor:
    """Convert a parameter to the dtype of log-probabilities, which is at least float32."""
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


def _of_shape(new: Any, batch_shape: Sequence[int], old: Distribution) -> Any:
    """Initialise the result of `expand` as torch prescribes, without validating the arguments again."""
    Distribution.__init__(new, torch.Size(batch_shape), old.event_shape, validate_args=False)
    new._validate_args = old._validate_args
    return new
