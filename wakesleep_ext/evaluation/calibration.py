r"""Test whether an amortised posterior q(z|x) is calibrated, for any simulator and any q.

Draw pairs z ~ p(z), x ~ p(x|z). If q(z|x) = p(z|x), then z and draws from q(z|x) have the same distribution given x. So
the rank of any function f(z, x) among its values at the draws is uniform. Each test below ranks another function:

- simulation-based calibration ranks every latent variable (Talts, Betancourt, Simpson, Vehtari & Gelman, "Validating
  Bayesian inference algorithms with simulation-based calibration", 2018);
- expected coverage ranks :math:`-\log q(z|x)`, which says how often z lies in the highest-density regions of q
  (Hermans, Delaunoy, Rozet, Wehenkel, Begy & Louppe, "A crisis in simulation-based inference?", TMLR 2022);
- TARP ranks the distance from a reference point (Lemos, Coogan, Hezaveh & Perreault-Levasseur, "Sampling-based accuracy
  testing of posterior estimators for general inference", ICML 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from wakesleep_ext import random
from wakesleep_ext.evaluation._arviz import arviz_stats

_NULL_DRAWS = 1000, 10_000
"""Least and greatest number of sets of uniform ranks from which the width of a band is computed."""


@dataclass(frozen=True)
class Posterior:
    """An amortised posterior: draws and log-probabilities of q(z|x), from any library.

    For a function `q` that maps x to a distribution of torch, this is
    `Posterior(lambda x, n: q(x).sample((n,)), lambda z, x: q(x).log_prob(z))`.
    """

    sample: Callable[[Tensor, int], Tensor]
    """Maps x `[N, *D]` and a number L to draws `[L, N, K]`."""
    log_prob: Callable[[Tensor, Tensor], Tensor]
    """Maps z `[L, N, K]` and x `[N, *D]` to log q(z|x), `[L, N]`."""

    def draw(self, x: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
        """Return draws `[L, N, K]` and their log-probabilities `[L, N]`, both checked.

        Raises:
            ValueError: the draws or the log-probabilities have another shape or contain NaN.
        """
        z = self.sample(x, num_samples)
        if z.ndim != 3 or z.shape[:2] != (num_samples, len(x)):
            raise ValueError(
                f"Posterior: expected sample(x, {num_samples}) to have shape [{num_samples}, {len(x)}, K], "
                f"got {list(z.shape)}"
            )
        return z, self.scores(z, x)

    def scores(self, z: Tensor, x: Tensor) -> Tensor:
        """Return log q(z|x), `[L, N]`, checked as in :meth:`draw`."""
        log_q = self.log_prob(z, x)
        if log_q.shape != z.shape[:2]:
            raise ValueError(
                f"Posterior: expected log_prob(z, x) to have shape {list(z.shape[:2])}, got {list(log_q.shape)}"
            )
        for name, values in {"sample(x, n)": z, "log_prob(z, x)": log_q}.items():
            if values.isnan().any():
                raise ValueError(f"Posterior: expected {name} to return numbers, got NaN")
        return log_q


@dataclass(frozen=True)
class Ranks:
    """Ranks of the true values of Q functions among their values at L posterior draws, for N simulations."""

    ranks: Tensor
    """int64 `[N, Q]`, from 0 to L, on the CPU."""
    num_samples: int
    """L."""

    def ecdf(self) -> Tensor:
        """Return the share of ranks below k, for k = 1, ..., L: float64 `[L, Q]`. It is k / (L + 1) for uniform ranks.

        The ranks of expected coverage and TARP make this the expected coverage of the region with credibility
        k / (L + 1).
        """
        counts = torch.zeros(self.num_samples + 1, self.ranks.shape[1], dtype=torch.float64)
        counts.scatter_add_(0, self.ranks, torch.ones_like(self.ranks, dtype=torch.float64))
        return counts.cumsum(0)[:-1] / len(self.ranks)

    def levels(self) -> Tensor:
        """Return k / (L + 1) for k = 1, ..., L: float64 `[L]`."""
        return torch.arange(1, self.num_samples + 1, dtype=torch.float64) / (self.num_samples + 1)

    def band(self, prob: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return bounds, `[L]` each, that contain all Q curves of :meth:`ecdf` with this probability if q is exact.

        A band is simultaneous over k (Säilynoja, Bürkner & Vehtari, "Graphical test for discrete uniformity and its
        applications in goodness-of-fit evaluation and multiple sample comparison", 2022), and over the Q functions by
        Bonferroni's inequality. It comes from `arviz-stats`.

        Raises:
            ModuleNotFoundError: `arviz-stats` is not installed.
        """
        return _band(len(self.ranks), self.num_samples, 1 - (1 - prob) / self.ranks.shape[1])

    def outside(self, prob: float = 0.95) -> Tensor:
        """Return true for each function whose curve leaves the band: bool `[Q]`. If any does, q is not exact."""
        (lower, upper), curves, rounding = self.band(prob), self.ecdf(), 1e-9
        beyond = (curves < lower[:, None] - rounding) | (curves > upper[:, None] + rounding)
        return beyond.any(0)


class Calibration(NamedTuple):
    """The ranks of all three tests, from the same draws."""

    marginals: Ranks
    """Simulation-based calibration: one function per latent variable."""
    coverage: Ranks
    """Expected coverage. A curve below the diagonal means that q is overconfident."""
    tarp: Ranks
    """TARP."""


@torch.no_grad()
def calibrate(
    z: Tensor,
    x: Tensor,
    posterior: Posterior,
    num_samples: int = 99,
    *,
    references: Tensor | None = None,
    seed: int = 0,
    chunk_rows: int = 20_000,
    on_simulations: Callable[[int], object] = lambda simulations: None,
) -> Calibration:
    """Rank the z of each simulation among draws from q(z|x), in all three tests.

    Equal values, which discrete latent variables have, are ranked in random order.

    Args:
        z: the latent variables of the simulations, `[N, K]`, from p(z).
        x: what was observed, `[N, *D]`, from p(x|z).
        posterior: q(z|x).
        num_samples: L, the number of draws per simulation.
        references: TARP's reference points, `[N, K]`. They may depend on x, but not on z. By default, each is the z of
            another simulation. With these, no test can tell q(z|x) = p(z) from the posterior. References that depend
            on x can.
        seed: seed of the order of equal values. The draws are the posterior's own.
        chunk_rows: greatest number of draws in memory, if a single simulation has no more.
        on_simulations: called with the number of simulations just completed.

    Raises:
        ValueError: there are fewer than two simulations or no draws, or a shape does not fit.
    """
    if z.ndim != 2 or len(z) < 2 or len(x) != len(z) or not z.is_floating_point():
        raise ValueError(
            f"calibrate: expected floating z [N, K] and x [N, ...] with N >= 2, got {z.dtype} {list(z.shape)} and "
            f"{list(x.shape)}"
        )
    if num_samples < 1:
        raise ValueError(f"calibrate: expected num_samples >= 1, got {num_samples}")
    references = z.roll(1, 0) if references is None else references
    if references.shape != z.shape:
        raise ValueError(f"calibrate: expected references of shape {list(z.shape)}, got {list(references.shape)}")
    spread = z.std(0)
    scale = torch.where(spread > 0, spread, 1)
    rows = torch.arange(len(z), device=z.device).split(max(1, chunk_rows // num_samples))
    found = []
    for number, chunk in enumerate(rows):
        of_z, of_x = z[chunk], x[chunk]
        draws, log_q = posterior.draw(of_x, num_samples)
        if draws.shape[-1] != z.shape[-1]:
            raise ValueError(f"calibrate: expected posterior draws of size {z.shape[-1]}, got {draws.shape[-1]}")
        own = posterior.scores(of_z[None], of_x)[0]
        distance, distances = (((of - references[chunk]) / scale).norm(dim=-1) for of in (of_z, draws))
        value = torch.cat((of_z, -own[:, None], distance[:, None]), -1)
        values = torch.cat((draws, -log_q[..., None], distances[..., None]), -1)
        found.append(rank(value, values, random.make_key(seed, number, z.device)).cpu())
        on_simulations(len(chunk))
    parts = torch.cat(found).split([z.shape[1], 1, 1], 1)
    return Calibration(*(Ranks(part, num_samples) for part in parts))


def rank(value: Tensor, draws: Tensor, key: Tensor) -> Tensor:
    """Return the rank of each value among L draws, from 0 to L: `[*B], [L, *B] -> [*B]`, int64.

    The rank is the number of smaller draws, plus a uniform share of the equal ones, so that discrete values that have
    the same distribution as the draws have uniform ranks, too.

    Args:
        value: the values to rank.
        draws: the draws to compare with.
        key: random key for the order of equal values (see `wakesleep_ext.random.make_key`).
    """
    smaller, equal = (draws < value).sum(0), (draws == value).sum(0)
    if not equal.any():
        return smaller
    places = random.uniforms(key, value.shape, torch.float64) * (equal + 1)
    return smaller + places.ceil().long() - 1


@cache
def _band(num_simulations: int, num_samples: int, prob: float) -> tuple[Tensor, Tensor]:
    import numpy as np

    ecdf_utils = arviz_stats().ecdf_utils
    levels = np.arange(1, num_samples + 1) / (num_samples + 1)
    least, greatest = _NULL_DRAWS
    draws = min(max(least, math.ceil(10 / (1 - prob))), greatest)
    pointwise = ecdf_utils.simulate_confidence_bands(num_simulations, 1, levels, prob, draws, np.random.default_rng(0))
    lower, upper = ecdf_utils.get_pointwise_confidence_band(pointwise, num_simulations, levels)
    return torch.from_numpy(lower), torch.from_numpy(upper)
