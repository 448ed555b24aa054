"""Whether dreams can be told from data: a two-sample test that needs no trained judge, and no bandwidth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wakesleep_ext import ops, random


@dataclass(frozen=True)
class Discrepancy:
    """Between two sets of images."""

    energy_distance: float
    """Zero in expectation if they are of one distribution, then as often negative as positive; larger otherwise."""
    p_value: float
    """How often sets mixed at random are as far apart."""


@torch.no_grad()
def energy_distance(
    x: Tensor, y: Tensor, num_permutations: int = 499, *, seed: int = 0, chunk_rows: int = 1000
) -> Discrepancy:
    r"""Energy distance between the distributions that two sets of images were drawn from.

    .. math:: 2\,\mathbb E\|x - y\| - \mathbb E\|x - x'\| - \mathbb E\|y - y'\|

    It is the squared maximum mean discrepancy of the kernel :math:`-\|x - y\|`, and zero for equal distributions alone
    (Székely & Rizzo, "Energy statistics", 2013). Means are over pairs of different images, so the estimate is unbiased;
    between binary images the distance is the square root of the number of pixels in which they differ. The p-value is
    that of a permutation test, (1 + as far apart)/(1 + permutations), exact for any number of images.

    Args:
        x: binary images `[N, D]`, N >= 2.
        y: others, `[M, D]`, M >= 2.
        num_permutations: into how many other pairs of sets the images are divided.
        seed: of the permutations.
        chunk_rows: images whose distances to all others are held at a time. Memory is that of `chunk_rows` plus
            `num_permutations` numbers for each image.

    Raises:
        ValueError: fewer than two images in a set, or images of different sizes.
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
    # which images are in the first set: as they are in column 0, permuted in the others
    first = torch.zeros(total, num_permutations + 1, device=pooled.device)
    first.scatter_(0, order[:, : len(x)].t(), 1.0)

    pixels_on = pooled.sum(-1)
    within_first = torch.zeros(num_permutations + 1, dtype=torch.float64, device=pooled.device)
    across, everything = torch.zeros_like(within_first), 0.0
    for rows in torch.arange(total, device=pooled.device).split(chunk_rows):
        differing = pixels_on[rows, None] + pixels_on - 2 * pooled[rows] @ pooled.t()  # exact: sums of whole numbers
        distances = differing.sqrt()
        to_first = (distances @ first).double()
        within = (first[rows] * to_first).sum(0)
        within_first += within
        across += to_first.sum(0) - within
        everything += distances.double().sum().item()
    within_second = everything - within_first - 2 * across
    statistic = 2 * across / (len(x) * len(y))
    statistic -= within_first / (len(x) * (len(x) - 1)) + within_second / (len(y) * (len(y) - 1))
    as_far = (statistic >= statistic[0]).double()  # itself included
    return Discrepancy(statistic[0].item(), as_far.mean().item())
