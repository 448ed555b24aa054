"""Fused Gaussian and Bernoulli ops for PyTorch, and a Helmholtz machine trained with them by wake-sleep.

The ops are plain functions, documented in :mod:`wakesleep_ext.ops`, that anyone's model may call. Importing this
package loads them and nothing else; the trainer lives in modules of its own (``models``, ``objectives``,
``training``, ``evaluation``, ...).
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
    gaussian_log_prob,
    gaussian_parameters,
    gaussian_rsample,
    gaussian_rsample_log_prob,
    linear,
    linear_bernoulli_log_prob,
    linear_bernoulli_log_prob_sum,
    linear_bernoulli_sample,
    mlp,
    standard_gaussian_log_prob,
)

_flops.register_when_counted()

try:
    __version__ = version("wakesleep_ext")
except PackageNotFoundError:  # a source tree that was built in place
    __version__ = "0+unknown"

__all__ = [
    "__version__",
    "adam_",
    "bernoulli_log_prob",
    "bernoulli_sample",
    "binarize",
    "distributions",
    "gaussian_kl",
    "gaussian_log_prob",
    "gaussian_parameters",
    "gaussian_rsample",
    "gaussian_rsample_log_prob",
    "linear",
    "linear_bernoulli_log_prob",
    "linear_bernoulli_log_prob_sum",
    "linear_bernoulli_sample",
    "mlp",
    "modules",
    "random",
    "reference",
    "standard_gaussian_log_prob",
]
