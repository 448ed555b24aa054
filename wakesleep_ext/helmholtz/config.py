"""Configuration of a Helmholtz machine, and names of its gradient estimators.

Importing this module does not import torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Activation = Literal["tanh", "relu", "gelu", "silu", "elu", "softplus", "sigmoid"]
Latents = Literal["gaussian", "bernoulli"]
PhiGradient = Literal["score", "score-cv", "dreg", "stl"]
"""Estimators of the recognition network's gradient in the reweighted wake phase; see
:func:`wakesleep_ext.helmholtz.objectives.reweighted_wake_losses`."""
PATHWISE: tuple[PhiGradient, ...] = ("dreg", "stl")
"""The estimators that differentiate through the draws. One loss then trains both networks."""


def check_logvar_bounds(owner: str, bounds: tuple[float, float] | None) -> None:
    """Check that bounds on log-variances, which are optional, are two finite numbers in increasing order.

    Raises:
        ValueError: they are not; the message names their owner.
    """
    if bounds is None:
        return
    is_pair = isinstance(bounds, tuple) and len(bounds) == 2 and all(isinstance(bound, int | float) for bound in bounds)
    if not is_pair or not -math.inf < bounds[0] < bounds[1] < math.inf:
        raise ValueError(f"{owner}: expected logvar_bounds to be two finite numbers, the lower first, got {bounds!r}")


@dataclass(frozen=True)
class ModelConfig:
    """Specifies the layer sizes, the kind of latent variables and the activation of both networks.

    Raises:
        ValueError: a size is not a positive integer, a name is unknown, or bounds are not finite numbers in increasing
            order.
    """

    observed: int
    """Pixels per image, D."""
    latent: tuple[int, ...] = (50,)
    """Number of latent variables in each stochastic layer, starting with the layer next to x."""
    recognition_hidden: tuple[int, ...] = (200, 200)
    """Widths of the hidden layers of q(z_1|x), ordered from x to z_1."""
    generative_hidden: tuple[int, ...] = (200, 200)
    """Widths of the hidden layers of p(x|z_1), ordered from z_1 to x."""
    latent_hidden: tuple[int, ...] = (100, 100)
    """Widths of the hidden layers between consecutive stochastic layers, the same in both networks."""
    latents: Latents = "gaussian"
    """Kind of latent variables: Gaussian with prior N(0, I), or Bernoulli with a learnt prior. The Bernoulli model is a
    sigmoid belief network, as in the first Helmholtz machines."""
    activation: Activation = "tanh"
    """Activation after each hidden layer."""
    logvar_bounds: tuple[float, float] | None = None
    """Lowest and highest log-variance of Gaussian latent variables; by default, there are no bounds. The output of the
    networks is clamped, so a log-variance outside has no gradient. The prior stays N(0, I)."""

    def __post_init__(self) -> None:
        sizes = {
            "observed": (self.observed,),
            "latent": self.latent,
            "recognition_hidden": self.recognition_hidden,
            "generative_hidden": self.generative_hidden,
            "latent_hidden": self.latent_hidden,
        }
        for name, values in sizes.items():
            if not isinstance(values, tuple):
                raise ValueError(f"ModelConfig: expected {name} to be a tuple of sizes, got {values!r}")
            if not all(type(value) is int and value > 0 for value in values):
                raise ValueError(f"ModelConfig: expected {name} > 0, got {getattr(self, name)}")
        if not self.latent:
            raise ValueError("ModelConfig: expected latent to name at least one layer, got ()")
        for name, known in (("latents", get_args(Latents)), ("activation", get_args(Activation))):
            if (given := getattr(self, name)) not in known:
                raise ValueError(f"ModelConfig: expected {name} to be one of {', '.join(known)}, got {given!r}")
        check_logvar_bounds("ModelConfig", self.logvar_bounds)
        if self.logvar_bounds is not None and self.latents != "gaussian":
            raise ValueError(
                f"ModelConfig: expected logvar_bounds None with latents {self.latents!r}, got {self.logvar_bounds}"
            )
