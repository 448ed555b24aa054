"""Test whether dreams differ from data. The two-sample test needs no trained classifier and no kernel bandwidth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wakesleep_ext import ops, random


@dataclass(frozen=True)
class Discrepancy:
    """The difference between two sets of images."""

    energy_distance: float
    """Unbiased estimate of the energy distance. Its expectation is zero if both sets have the same distribution, and
    positive otherwise. The estimate may be negative."""
    p_value: float
    """Fraction of random splits of the pooled images whose energy distance is at least the observed one."""


@torch.no_grad()
def energy_distance(
    x: Tensor, y: Tensor, num_permutations: int = 499, *, seed: int = 0, chunk_rows: int = 1000
) -> Discrepancy:
    r"""Estimate the energy distance between the distributions of two sets of images.

    .. math:: 2\,\mathbb E\|x - y\| - \mathbb E\|x - x'\| - \mathbb E\|y - y'\|

    The energy distance is the squared maximum mean discrepancy with kernel :math:`-\|x - y\|`. It is zero only for
    equal distributions (Székely & Rizzo, "Energy statistics", 2013). Means are over pairs of distinct images, so the
    estimate is unbiased. The distance between two binary images is the square root of the number of pixels in which the
    images differ. The p-value comes from a permutation test and is (1 + n) / (1 + `num_permutations`), where n is the
    number of permutations whose energy distance is at least the observed one. The test is exact for any number of
    images.

    Args:
        x: binary images `[N, D]`, N >= 2.
        y: other binary images `[M, D]`, M >= 2.
        num_permutations: number of random splits of the pooled images to compare with.
        seed: seed of the permutations.
        chunk_rows: number of images whose distances to all others are in memory at the same time. In total,
            `chunk_rows + num_permutations` numbers per image are in memory.

    Raises:
        ValueError: a set has fewer than two images, or the images differ in size.
    """
    for name, images in {"x": x, "y": y}.items():
        if images.ndim != 2 or len(images) < 2 or images.shape[1] != x.shape[1]:
            raise ValueError(
                f"energy_distance: expected {name} to have shape [N, {x.shape[-1]}] with N >= 2, "
                f"got {list(images.shape)}"
            )
    pooled = torch.cat((x.float(), y.float()))
    total = len(pooled)
    zeros = torch.zeros(total, device=pooled.device)
    ranks = ops.gaussian_rsample(zeros, zeros, (num_permutations,), key=random.make_key(seed, device=pooled.device))
    order = torch.cat((torch.arange(total, device=pooled.device)[None], ranks.argsort(dim=-1)))
    # first[i, j] is 1 if split j puts image i in the first set; split 0 is the observed one, the others are random
    first = torch.zeros(total, num_permutations + 1, device=pooled.device)
    first.scatter_(0, order[:, : len(x)].t(), 1.0)

    pixels_on = pooled.sum(-1)
    within_first = torch.zeros(num_permutations + 1, dtype=torch.float64, device=pooled.device)
    across, everything = torch.zeros_like(within_first), 0.0
    for rows in torch.arange(total, device=pooled.device).split(chunk_rows):
        differing = pixels_on[rows, None] + pixels_on - 2 * pooled[rows] @ pooled.t()  # exact: sums of integers
        distances = differing.sqrt()
        to_first = (distances @ first).double()
        within = (first[rows] * to_first).sum(0)
        within_first += within
        across += to_first.sum(0) - within
        everything += distances.double().sum().item()
    within_second = everything - within_first - 2 * across
    statistic = 2 * across / (len(x) * len(y))
    statistic -= within_first / (len(x) * (len(x) - 1)) + within_second / (len(y) * (len(y) - 1))
    as_far = (statistic >= statistic[0]).double()  # the observed split counts as one of the permutations
    return Discrepancy(statistic[0].item(), as_far.mean().item())
