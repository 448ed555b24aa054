"""Whether the compiled ops are right on this very machine: `wakesleep selftest`.

Every op, values and gradients, at every dtype and on every device, against its formula in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import linear

from wakesleep_ext import _build, ops, random, reference

_SAMPLES, _BATCH, _EVENT = 3, 5, 131  # an odd width: whole vectors and a ragged end
_FEATURES = 17
_KEY = random.make_key(7)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "gaussian_rsample": ("mu", "logvar"),
    "gaussian_rsample_log_prob": ("mu", "logvar"),
    "gaussian_log_prob": ("mu", "logvar", "z"),
    "standard_gaussian_log_prob": ("z",),
    "gaussian_kl": ("mu", "logvar"),
    "bernoulli_log_prob": ("logits", "x"),
    "bernoulli_sample": ("logits",),
    "linear": ("h", "weight", "bias"),
    "perceptron": ("h", "weight", "bias", "square", "bias"),
    "linear_bernoulli_log_prob": ("h", "weight", "bias", "x"),
    "linear_bernoulli_log_prob_sum": ("h", "weight", "bias", "x", "importance"),
    "linear_bernoulli_sample": ("h", "weight", "bias"),
}
_SHAPES = {
    "z": (_SAMPLES, _BATCH, _EVENT),
    "logits": (_SAMPLES, _BATCH, _EVENT),
    "h": (_SAMPLES, _BATCH, _FEATURES),
    "weight": (_EVENT, _FEATURES),
    "bias": (_EVENT,),
    "square": (_EVENT, _EVENT),
    "importance": (_BATCH,),
}


@dataclass(frozen=True)
class Outcome:
    """How an op compares with float64."""

    op: str
    device: str
    dtype: torch.dtype
    error: float
    """Largest deviation of a result or a gradient, relative to the largest; of a pixel drawn otherwise,
    how far u is from p."""
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # false for NaN


def outcomes(devices: Sequence[str] | None = None) -> Iterator[Outcome]:
    """Check every op on the CPU and, where the kernels and torch have CUDA, on the GPU."""
    if devices is None:
        devices = ["cpu", "cuda"] if _build.CUDA_VERSION and torch.cuda.is_available() else ["cpu"]
    for op in _ARGUMENTS:
        for device in devices:
            for dtype in _DTYPES:
                yield check(op, device, dtype)


def check(op: str, device: str, dtype: torch.dtype) -> Outcome:
    """Compare an op with its twin in :mod:`wakesleep_ext.reference`, which gets the same inputs in float64."""
    inputs = [_input(name).to(device, dtype).requires_grad_() for name in _ARGUMENTS[op]]
    exact_inputs = [tensor.detach().cpu().double().requires_grad_() for tensor in inputs]
    found = _results_and_gradients(_function(ops, op), inputs)
    exact = _results_and_gradients(_function(reference, op), exact_inputs)
    deviations = [(a - b).abs() for a, b in zip(found, exact, strict=True)]
    if op.endswith("bernoulli_sample"):
        # a pixel may be another where its uniform lies between the probability and its rounding
        uniforms = random.uniforms(_KEY, exact[0].shape, torch.float64)
        exact_logits = exact_inputs[0] if len(exact_inputs) == 1 else linear(*exact_inputs)
        deviations[0] *= (uniforms - exact_logits.detach().sigmoid()).abs()
    errors = [(d.max() / b.abs().max().clamp_min(1)).item() for d, b in zip(deviations, exact, strict=True)]
    arithmetic = 1e-13 if dtype == torch.float64 else 4e-6  # sums over the event, in float32 for half types too
    return Outcome(op, device, dtype, max(errors), max(arithmetic, torch.finfo(dtype).eps))


def _input(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    value = torch.randn(_SHAPES.get(name, (_BATCH, _EVENT)), generator=generator, dtype=torch.float64)
    return (value > 0).double() if name == "x" else value


def _function(module: ModuleType, op: str) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """The op as a function of its tensors: a draw has a key and maybe a sample shape, a layer an activation."""
    function: Callable[..., Tensor | tuple[Tensor, ...]] = getattr(module, op)
    if op == "linear":
        return partial(function, activation="tanh")
    if op == "perceptron":
        return lambda h, *layers: function(h, layers[::2], layers[1::2], "tanh")
    if "sample" not in op:
        return function
    sample_shape = () if op == "linear_bernoulli_sample" else ((_SAMPLES,),)
    return lambda *tensors: function(*tensors, *sample_shape, key=_KEY.to(tensors[0].device))


def _results_and_gradients(function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[Tensor]) -> list[Tensor]:
    results = function(*inputs)
    results = (results,) if isinstance(results, Tensor) else results
    gradients: Sequence[Tensor] = ()
    if results[0].requires_grad:
        # an upstream gradient that differs from row to row, and is the same at every precision
        upstream = [torch.linspace(-1, 1, r.numel()).view(r.shape).to(r) for r in results]
        gradients = torch.autograd.grad(results, inputs, upstream)
    return [tensor.detach().cpu().double() for tensor in (*results, *gradients)]
