"""Accumulate any number of importance weights in constant memory."""

from __future__ import annotations

import torch
from torch import Tensor


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
