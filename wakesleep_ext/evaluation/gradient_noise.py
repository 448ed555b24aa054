r"""Measure the signal-to-noise ratio of stochastic gradients, to compare estimators and objectives.

For a gradient estimate g with mean :math:`\mu` and covariance :math:`\Sigma`, the ratio is

.. math:: \mathrm{SNR} = \frac{\|\mu\|}{\sqrt{\operatorname{tr} \Sigma}}

It is the reciprocal of the estimate's relative root-mean-square error. Rainforth, Kosiorek, Le, Maddison, Igl, Wood &
Teh ("Tighter variational bounds are not necessarily better", ICML 2018) define it for each parameter. This is the ratio
of the whole gradient. Its square is the reciprocal of the gradient noise scale of McCandlish, Kaplan, Amodei et al.
("An empirical model of large-batch training", 2018). The ratio grows with the square root of the batch size, so compare
ratios at equal batch sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GradientNoise:
    """The mean and the noise of a stochastic gradient."""

    signal: float
    r"""Estimate of :math:`\|\mu\|`. The noise in the mean of the gradients is subtracted, so that the estimate is 0 for
    about half of all gradients whose mean is 0."""
    noise: float
    r"""Estimate of :math:`\sqrt{\operatorname{tr} \Sigma}`."""

    @property
    def ratio(self) -> float:
        """The signal-to-noise ratio; infinite if there is no noise."""
        return self.signal / self.noise if self.noise else torch.inf


def gradient_noise(loss: Callable[[], Tensor], parameters: Iterable[Tensor], num_gradients: int = 200) -> GradientNoise:
    r"""Estimate mean and noise of the gradient of a loss that draws new random numbers at every call.

    With n gradients :math:`g_i` and their mean :math:`\bar g`, unbiased estimates are

    .. math:: \operatorname{tr} \Sigma \approx \frac{1}{n-1} \sum_i \|g_i - \bar g\|^2, \qquad
        \|\mu\|^2 \approx \|\bar g\|^2 - \frac1n \operatorname{tr} \Sigma

    Sums are in float64. Existing `.grad` values are neither read nor changed.

    Args:
        loss: returns the loss of a new batch and new draws, 0-dimensional.
        parameters: the tensors to differentiate with respect to. A loss may ignore some of them.
        num_gradients: n, at least 2.

    Raises:
        ValueError: there are fewer than two gradients, no parameters, or a gradient is not finite.
    """
    parameters = list(parameters)
    if num_gradients < 2 or not parameters:
        raise ValueError(
            "gradient_noise: expected at least two gradients and one parameter, "
            f"got {num_gradients} and {len(parameters)}"
        )
    total, squares = None, 0.0
    for _ in range(num_gradients):
        found = torch.autograd.grad(loss(), parameters, allow_unused=True, materialize_grads=True)
        gradient = torch.cat([part.flatten().double() for part in found])
        total = gradient if total is None else total.add_(gradient)
        squares += gradient.square().sum().item()
    assert total is not None
    of_mean = (total / num_gradients).square().sum().item()
    variance = max(0.0, squares - num_gradients * of_mean) / (num_gradients - 1)
    if not (variance + of_mean) < torch.inf:
        raise ValueError("gradient_noise: expected finite gradients, got others")
    return GradientNoise(max(0.0, of_mean - variance / num_gradients) ** 0.5, variance**0.5)
