"""The classes of :mod:`wakesleep_ext.distributions` for Pyro, extended by Pyro's `TorchDistributionMixin`.

Importing this module imports Pyro.
"""

from __future__ import annotations

from pyro.distributions.torch_distribution import TorchDistributionMixin

from wakesleep_ext import distributions

__all__ = ["BernoulliVector", "DiagonalGaussian"]


class DiagonalGaussian(distributions.DiagonalGaussian, TorchDistributionMixin):  # type: ignore[misc, unused-ignore]
    __doc__ = distributions.DiagonalGaussian.__doc__


class BernoulliVector(distributions.BernoulliVector, TorchDistributionMixin):  # type: ignore[misc, unused-ignore]
    __doc__ = distributions.BernoulliVector.__doc__
