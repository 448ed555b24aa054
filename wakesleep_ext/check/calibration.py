"""Run simulation-based calibration (see `wakesleep_ext.evaluation.calibration`) with a chi-squared test."""

from __future__ import annotations

import torch
from torch import Tensor

from wakesleep_ext.check.training import Keys, Networks
from wakesleep_ext.evaluation.calibration import rank

NUM_SAMPLES = 19
"""Draws from q per dream. The rank of z among 19 draws has 20 possible values."""


@torch.no_grad()
def ranks(networks: Networks, num_dreams: int, seed: int = 1) -> Tensor:
    """Return the rank of each dream's own z_1, which generated the dream, among draws from q(z_1|x).

    A rank is the number of draws below z_1, from 0 to `NUM_SAMPLES`: int64 `[num_dreams, K]`.
    """
    keys, (recognition, generative) = Keys(seed), networks
    latents, x = generative.dream(num_dreams, keys=keys(len(generative)))
    draws = recognition.rsample(x, NUM_SAMPLES, keys=keys(len(recognition)))
    return rank(latents[0], draws[0], *keys(1))


def uniformity(ranks: Tensor) -> float:
    """Return the p-value of Pearson's chi-squared test that ranks `[N]` are uniform."""
    counts = ranks.bincount(minlength=NUM_SAMPLES + 1).double()
    expected = counts.mean()
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor(NUM_SAMPLES / 2, dtype=torch.float64), chi_squared / 2).item()
