"""Fused Gaussian and Bernoulli ops for PyTorch, and a Helmholtz machine trained with them by wake-sleep.

The ops are plain functions that any model can call; see :mod:`wakesleep_ext.ops`. Importing this package does not
import the trainer. The trainer is in the subpackages ``helmholtz``, ``training`` and ``evaluation``, which must be
imported separately.
"""

from importlib.metadata import PackageNotFoundError, version

from wakesleep_ext import _loading, random, reference

_loading.load_kernels()

from wakesleep_ext import _flops, distributions, modules  # noqa: E402
from wakesleep_ext.ops import (  # noqa: E402  the operators must be registered first
    adam_,
    bernoulli_log_prob,
    bernoulli_sample,
    binarize,
    gaussian_kl,
    gaussian_kl_between,
    gaussian_log_prob,
    gaussian_log_prob_sum,
    gaussian_parameters,
    gaussian_rsample,
    gaussian_rsample_log_prob,
    linear,
    linear_bernoulli_log_prob,
    linear_bernoulli_log_prob_sum,
    linear_bernoulli_sample,
    linear_gaussian_rsample,
    mlp,
    standard_gaussian_log_prob,
)

_flops.register_when_counted()

try:
    __version__ = version("wakesleep_ext")
except PackageNotFoundError:  # a source tree, built in place
    __version__ = "0+unknown"

__all__ = [
    "__version__",
    "adam_",
    "bernoulli_log_prob",
    "bernoulli_sample",
    "binarize",
    "distributions",
    "gaussian_kl",
    "gaussian_kl_between",
    "gaussian_log_prob",
    "gaussian_log_prob_sum",
    "gaussian_parameters",
    "gaussian_rsample",
    "gaussian_rsample_log_prob",
    "linear",
    "linear_bernoulli_log_prob",
    "linear_bernoulli_log_prob_sum",
    "linear_bernoulli_sample",
    "linear_gaussian_rsample",
    "mlp",
    "modules",
    "random",
    "reference",
    "standard_gaussian_log_prob",
]
