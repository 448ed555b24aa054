"""Conditional distributions p(value | given): a network, and the distribution that its output parameterises.

A conditional is a module. It maps the conditioning value `given` to a distribution of :mod:`wakesleep_ext.densities`,
which draws samples and computes log-probabilities. The layers of a Helmholtz machine are conditionals, and call each
other only through this interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from wakesleep_ext import ops
from wakesleep_ext.densities import Bernoulli, Gaussian, LinearBernoulli, StandardGaussian
from wakesleep_ext.helmholtz.config import check_logvar_bounds
from wakesleep_ext.helmholtz.networks import Constant, MultilayerPerceptron
from wakesleep_ext.modules import runs_forward_only


class Conditional(nn.Module):
    """Maps the conditioning value `given`, `[*B, J]`, to p(value | given), one distribution per row."""

    has_rsample: ClassVar[bool] = False
    """True if draws are differentiable, as in `torch.distributions`."""

    def rsample(self, given: Tensor | None, sample_shape: Sequence[int] = (), *, key: Tensor | None = None) -> Tensor:
        """Draw samples `[*S, *B, K]` of p(value | given), as `self(given).rsample` does.

        A subclass may avoid storing the distribution's parameters.
        """
        draw: Tensor = self(given).rsample(sample_shape, key=key)
        return draw


class NetworkConditional(Conditional):
    """A conditional whose parameters come from a network.

    Args:
        network: any module that maps rows `[N, J]` to rows `[N, F]` or `[N, ...]`, such as feature maps. It receives
            one batch of rows in the dtype of its parameters, also if there are several samples per image. So it may
            contain convolutions and batch normalisation.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def parameters_given(self, given: Tensor | None) -> Tensor:
        """Return the output of the network for `given`, `[*B, J] -> [*B, F]`.

        Raises:
            ValueError: the network does not return one row for each row.
        """
        if given is None or isinstance(self.network, (MultilayerPerceptron, Constant)):  # accept any leading dimensions
            return self.network(given)
        rows = given.reshape(-1, given.shape[-1])
        parameter = next(self.network.parameters(), rows)
        output = self.network(rows.to(parameter.dtype))
        if output.dim() < 2 or len(output) != len(rows):
            raise ValueError(
                f"{type(self).__name__}: expected the network to return [{len(rows)}, ...] for rows "
                f"{list(rows.shape)}, got {list(output.shape)}"
            )
        flat = output.flatten(1)
        return flat.reshape(*given.shape[:-1], flat.shape[1])


class GaussianConditional(NetworkConditional):
    """A diagonal Gaussian whose parameters come from a network.

    Args:
        network: maps `given`, `[*B, J]`, to `[mu | logvar]` `[*B, 2K]`; see :class:`NetworkConditional`.
        logvar_bounds: the lowest and the highest log-variance. A logvar outside is clamped, and has no gradient.

    Raises:
        ValueError: the bounds are not finite numbers in increasing order.
    """

    has_rsample = True

    def __init__(self, network: nn.Module, logvar_bounds: tuple[float, float] | None = None) -> None:
        super().__init__(network)
        check_logvar_bounds(type(self).__name__, logvar_bounds)
        self.logvar_bounds = logvar_bounds

    def forward(self, given: Tensor) -> Gaussian:
        gaussian = Gaussian.from_packed(self.parameters_given(given))
        if self.logvar_bounds is None:
            return gaussian
        return Gaussian(gaussian.mu, gaussian.logvar.clamp(*self.logvar_bounds))

    def rsample(self, given: Tensor | None, sample_shape: Sequence[int] = (), *, key: Tensor | None = None) -> Tensor:
        network = self.network
        if (
            given is None
            or torch.is_grad_enabled()  # mlp computes the gradients of all layers at once
            or self.logvar_bounds is not None
            or not isinstance(network, MultilayerPerceptron)
            or len(network) == 1  # torch computes it faster on a CPU
            or not network.may_be_fused
            or type(self) is not GaussianConditional
            or not runs_forward_only(self)
        ):
            return super().rsample(given, sample_shape, key=key)
        head = network.head
        return ops.linear_gaussian_rsample(network.features(given), head.weight, head.bias, sample_shape, key=key)


class BernoulliConditional(NetworkConditional):
    """Independent Bernoulli variables whose logits come from a network.

    Args:
        network: maps `given`, `[*B, J]`, to logits `[*B, D]`; see :class:`NetworkConditional`.
    """

    def forward(self, given: Tensor) -> Bernoulli | LinearBernoulli:
        return Bernoulli(self.parameters_given(given))


class LinearBernoulliConditional(BernoulliConditional):
    """Independent Bernoulli variables whose logits come from an MLP and are recomputed instead of stored.

    Use this class for images, which have many pixels. For latent variables, use :class:`BernoulliConditional`, which
    stores the logits, since several samples are drawn per row. If a fused op cannot compute the last layer of the MLP,
    this class also stores the logits.

    Args:
        network: maps `given`, `[*B, J]`, to logits `[*B, D]`.
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
    """The prior N(0, I), which ignores `given`.

    Args:
        size: K, the number of latent variables.
    """

    has_rsample = True

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("zeros", torch.zeros(size))
        self.zeros: Tensor

    def forward(self, given: Tensor | None = None) -> StandardGaussian:
        return StandardGaussian(self.zeros, self.zeros)
