"""Check the compiled ops on this computer: `wakesleep selftest`.

The check compares the values and gradients of every op with a float64 reference, for every dtype and device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wakesleep_ext import _build, ops, random, reference
from wakesleep_ext._op_table import OPS, Op, Sizes, values

_SIZES = Sizes((3,), batch=5, event=131, features=17)  # odd widths cover full SIMD vectors and a remainder
_KEY = random.make_key(7)


@dataclass(frozen=True)
class Outcome:
    """The result of comparing an op with its float64 reference."""

    op: str
    device: str
    dtype: torch.dtype
    """The dtype of the op's input tensors."""
    error: float
    """The largest deviation of a result or gradient, relative to its tensor's largest value, or to 1 if that is larger.
    If a Bernoulli draw differs, its deviation is abs(u - p), where u is its uniform draw and p its probability."""
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # false for NaN


def outcomes(devices: Sequence[str] | None = None) -> Iterator[Outcome]:
    """Check every op on the CPU, and on the GPU if the kernels and torch support CUDA."""
    if devices is None:
        devices = ["cpu", "cuda"] if _build.CUDA_VERSION and torch.cuda.is_available() else ["cpu"]
    for op in OPS.values():
        for device in devices:
            for dtype in op.dtypes:
                yield check(op.name, device, dtype)


def check(name: str, device: str, dtype: torch.dtype) -> Outcome:
    """Compare an op with its float64 implementation in :mod:`wakesleep_ext.reference`, on the same inputs."""
    op = OPS[name]
    inputs = [tensor.to(device, dtype) for tensor in _inputs(op)]
    exact_inputs = [tensor.to("cpu", torch.float64, copy=True) for tensor in inputs]
    found = _results_and_gradients(op, _function(op, ops, device), inputs)
    exact = _results_and_gradients(op, _function(op, reference, "cpu"), exact_inputs)
    deviations = [(a - b).abs() for a, b in zip(found, exact, strict=True)]
    if op.probability is not None:
        # a draw may differ if its uniform lies between the exact and the rounded probability
        uniforms = random.uniforms(_KEY, exact[0].shape, torch.float64)
        deviations[0] *= (uniforms - op.probability(*exact_inputs)).abs()
    errors = [(d.max() / b.abs().max().clamp_min(1)).item() for d, b in zip(deviations, exact, strict=True)]
    arithmetic = 1e-13 if dtype == torch.float64 else 4e-6  # for sums over the event; half types are summed in float32
    roundings = 2 if "next_weight" in op.inputs else 1  # the hidden layer is rounded as well
    rounding = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    return Outcome(name, device, dtype, max(errors), max(arithmetic, roundings * rounding))


def _inputs(op: Op) -> list[Tensor]:
    return [
        values(name, _SIZES.shape(dimensions), torch.Generator().manual_seed(sum(name.encode())))
        for name, dimensions in op.inputs.items()
    ]


def _function(op: Op, module: Any, device: str) -> Callable[..., Any]:
    options = dict(op.options)
    if op.draws:
        options["key"] = _KEY.to(device)
    if op.takes_sample_shape:
        options["sample_shape"] = _SIZES.samples
    return op.function(module, **options)


def _results_and_gradients(op: Op, function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    for tensor in inputs:
        tensor.requires_grad_(op.is_differentiable)
    results = function(*inputs)
    results = (results,) if isinstance(results, Tensor) else results
    gradients: Sequence[Tensor] = ()
    if op.is_differentiable:
        # upstream gradients that differ between rows
        upstream = [torch.linspace(-1, 1, r.numel()).view(r.shape).to(r) for r in results]
        gradients = torch.autograd.grad(results, inputs, upstream)
    return [tensor.detach().cpu().double() for tensor in (*results, *gradients)]
