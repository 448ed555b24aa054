"""Measure importance weights: statistics of any number of weights in constant memory, and the tail of the largest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from wakesleep_ext.evaluation._arviz import arviz_stats

_EQUAL = 1e-3  # weights are equal if their logarithms differ by less: the mean is then known to 0.1%
_LEAST_SAMPLES = 25  # arviz-stats fits the tail to a fifth of the weights, and to five of them at least


class WeightedDraws(NamedTuple):
    """L draws z from q for each of N observations, and their importance weights w = p(x, z) / q(z|x)."""

    latents: Sequence[Tensor]
    """The parts of z, `[L, N, K]` each."""
    terms: Tensor
    """Terms of log w, `[T, L, N]`, float64."""

    @property
    def log_w(self) -> Tensor:
        """Sum of the terms: `[L, N]`."""
        return self.terms.sum(0)


def weighted_draws(
    draw: Callable[[Tensor, int], WeightedDraws], x: Tensor, num_samples: int, chunk_rows: int
) -> Iterator[tuple[Tensor, Iterator[WeightedDraws]]]:
    """Yield groups of observations, with K weighted draws for each observation, in chunks of at most `chunk_rows`.

    Args:
        draw: maps x `[N, ...]` and a number L to L draws per observation.
        x: observations `[N, ...]`.
        num_samples: K.
        chunk_rows: maximum number of draws in a chunk. A chunk contains all K draws of several observations, or some
            draws of one observation.
    """
    for group in x.split(max(1, chunk_rows // num_samples)):
        sizes = (min(chunk_rows, num_samples - first) for first in range(0, num_samples, chunk_rows))
        yield group, map(partial(draw, group), sizes)


def gathered(chunks: Iterable[WeightedDraws]) -> tuple[Tensor, Tensor]:
    """Return the log weights of all draws, `[K, N]`, and whether all draws of an observation are equal, bool `[N]`.

    Both are on the CPU.
    """
    log_w, equal, first = [], [], None
    for chunk in chunks:
        first = first or [z[:1] for z in chunk.latents]
        parts = [(z == of).all(-1).all(0) for z, of in zip(chunk.latents, first, strict=True)]
        log_w.append(chunk.log_w.cpu())
        equal.append(torch.stack(parts).all(0).cpu())
    return torch.cat(log_w), torch.stack(equal).all(0)


class ImportanceWeights:
    r"""Statistics of weights :math:`w_1, \dots, w_K` for each of N images, where K grows as weights are added.

    Only the sums of w, w log w and w² are stored, in float64. Weights are divided by the largest weight so far, so that
    no weight overflows and the largest does not underflow.

    Args:
        images: N.
        device: device of the weights.
    """

    def __init__(self, images: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        zero = torch.zeros(images, dtype=torch.float64, device=device)
        self._log_scale = torch.full_like(zero, torch.finfo(torch.float64).min)
        # sums over the scaled weights v = w / exp(log_scale)
        self._sum, self._sum_v_log_v, self._sum_squares = zero, zero, zero

    def add(self, log_w: Tensor) -> None:
        """Add log weights `[K, N]`, float64."""
        log_scale = torch.maximum(self._log_scale, log_w.amax(0))
        shift = self._log_scale - log_scale
        log_v = (log_w - log_scale).clamp_min(torch.finfo(torch.float64).min)  # so that 0 log 0 gives 0
        v, rescale = log_v.exp(), shift.exp()
        self._sum_v_log_v = rescale * (self._sum_v_log_v + shift * self._sum) + (v * log_v).sum(0)
        self._sum = rescale * self._sum + v.sum(0)
        self._sum_squares = rescale.square() * self._sum_squares + v.square().sum(0)
        self._log_scale = log_scale
        self.count += len(log_w)

    @property
    def log_mean(self) -> Tensor:
        """Log of the mean of w: `[N]`."""
        return self._log_scale + (self._sum / self.count).log()

    @property
    def effective_sample_size(self) -> Tensor:
        r"""Effective sample size from 1 to K, `[N]`: :math:`1 / \sum_k \tilde w_k^2`, with
        :math:`\tilde w_k = w_k / \sum_j w_j`.

        Source: Kong, "A note on importance sampling using standardized weights" (1992).
        """
        return self._sum.square() / self._sum_squares

    @property
    def divergence(self) -> Tensor:
        r"""Estimate of KL(target || proposal), from 0 to log K: `[N]`.

        The estimate is :math:`\sum_k \tilde w_k \log w_k - \log \frac1K \sum_k w_k`. This equals log K minus the
        entropy of the normalised weights."""
        return self._sum_v_log_v / self._sum - (self._sum / self.count).log()

    @property
    def standard_error(self) -> Tensor:
        r"""Standard error of :attr:`log_mean`: `[N]`, NaN if K = 1.

        To first order, it equals the relative standard error of the mean of w:

        .. math:: \sqrt{\frac{K / \mathrm{ESS} - 1}{K - 1}}
        """
        excess = (self.count / self.effective_sample_size - 1).clamp_min(0)
        return (excess / (self.count - 1 or torch.nan)).sqrt()


def pareto_k(log_w: Tensor, equal: Tensor | None = None) -> Tensor:
    r"""Return Pareto's k of the largest importance weights of each image: float64 `[N]`, on the CPU.

    The weights have about 1/k finite moments. Importance sampling is reliable if k is below :func:`pareto_threshold`.
    `arviz-stats` fits k to the largest weights: the top fifth, or the top :math:`3\sqrt K` if that is fewer. If these
    weights are equal to 0.1%, as for the exact posterior, k is 0. If over a quarter of them vanish in comparison with
    the largest, k is infinite. If over a quarter of them equal the smallest, there is no fit, and k is NaN; only
    discrete latent variables repeat weights.

    Source: Vehtari, Simpson, Gelman, Yao & Gabry, "Pareto smoothed importance sampling" (JMLR 2024).

    Args:
        log_w: log weights `[K, N]`, K >= 25.
        equal: bool `[N]`, true if all draws for an image are equal. Then k is infinite: a single value of z shows
            nothing of the posterior.

    Raises:
        ValueError: there are fewer than 25 weights, or an image has NaN, infinite or no positive weights.
        ModuleNotFoundError: `arviz-stats` is not installed.
    """
    if log_w.ndim != 2 or len(log_w) < _LEAST_SAMPLES:
        raise ValueError(f"pareto_k: expected log_w [K, N] with K >= {_LEAST_SAMPLES}, got {list(log_w.shape)}")
    if (bad := log_w.isnan().any(0) | ~log_w.amax(0).isfinite()).any():
        raise ValueError(f"pareto_k: expected finite weights, not all zero, got others for {int(bad.sum())} images")
    array_stats = arviz_stats().array_stats
    log_w = log_w.double().cpu()
    size = len(log_w) // 5 if len(log_w) <= 225 else int(3 * len(log_w) ** 0.5)  # of the tail, as in arviz-stats
    tail = (log_w - log_w.amax(0)).topk(size + 1, 0).values
    quartile, cutoff = tail[size - int(size / 4 + 0.5)].exp(), tail[-1].exp()
    k = torch.where(quartile > 0, torch.nan, torch.inf).double()
    k[tail[-1] > -_EQUAL] = 0
    if equal is not None:
        k[equal.cpu()] = torch.inf
    for image in (k.isnan() & (quartile > cutoff)).nonzero().flatten().tolist():
        k[image] = float(array_stats.psislw(-log_w[:, image].numpy())[1])  # it takes negative log weights
    return k


def pareto_threshold(num_samples: int) -> float:
    r"""Return the largest k at which K weights suffice: :math:`\min(1 - 1/\log_{10} K,\, 0.7)`.

    Source: Vehtari et al. 2024, as for :func:`pareto_k`.
    """
    return min(1 - 1 / math.log10(num_samples), 0.7)
