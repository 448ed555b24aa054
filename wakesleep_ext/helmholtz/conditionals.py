"""Conditional distributions p(value | given): a network, and the distribution that its output parameterises.

A conditional is a module; called with what is given it returns a distribution of :mod:`wakesleep_ext.densities`, which
draws and scores values. The layers of a Helmholtz machine are made of these, and see nothing else of each other.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from wakesleep_ext.densities import Bernoulli, Gaussian, LinearBernoulli, StandardGaussian
from wakesleep_ext.helmholtz.networks import MultilayerPerceptron


class Conditional(nn.Module):
    """p(value | given): called with what is given, `[*B, J]`, it returns a distribution for each row."""

    has_rsample: ClassVar[bool] = False
    """Whether draws are differentiable, as in `torch.distributions`."""


class GaussianConditional(Conditional):
    """A diagonal Gaussian whose parameters a network returns.

    Args:
        network: maps what is given, `[*B, J]`, to `[mu | logvar]` `[*B, 2K]`.
    """

    has_rsample = True

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, given: Tensor) -> Gaussian:
        return Gaussian.from_packed(self.network(given))


class BernoulliConditional(Conditional):
    """Independent Bernoulli variables whose logits a network returns.

    Args:
        network: maps what is given, `[*B, J]`, to logits `[*B, D]`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, given: Tensor) -> Bernoulli | LinearBernoulli:
        return Bernoulli(self.network(given))


class LinearBernoulliConditional(BernoulliConditional):
    """Independent Bernoulli variables whose logits an MLP returns, which are computed whenever they are needed.

    The many pixels of an image are better not kept. Latent variables are, of which several samples are drawn for each
    given row: these have a :class:`BernoulliConditional`. So has an MLP whose last layer is not plain.

    Args:
        network: maps what is given, `[*B, J]`, to logits `[*B, D]`.
    """

    network: MultilayerPerceptron

    def __init__(self, network: MultilayerPerceptron) -> None:
        super().__init__(network)

    def forward(self, given: Tensor) -> Bernoulli | LinearBernoulli:
        if not self.network.may_be_fused:
            return super().forward(given)
        head = self.network.head
        return LinearBernoulli(self.network.features(given), head.weight, head.bias)


class StandardGaussianPrior(Conditional):
    """N(0, I), whatever is given.

    Args:
        size: latent variables, K.
    """

    has_rsample = True

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("zeros", torch.zeros(size))
        self.zeros: Tensor

    def forward(self, given: Tensor | None = None) -> StandardGaussian:
        return StandardGaussian(self.zeros, self.zeros)
