"""Compute the FLOPs of the ops' GEMMs, for `torch.utils.flop_counter`.

A GEMM [m, k] x [k, n] takes 2 m k n FLOPs, as in torch. Element-wise work is not counted. The FLOPs of a composite op
are the sum over the ops that it calls. A formula receives the shape of each tensor argument instead of the tensor.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"

Shape = Sequence[int]


def _product(rows: int, weight: Shape) -> int:
    """Return the FLOPs of a [rows, H] x [H, D] product; weight is [D, H].

    Each of the two GEMMs in the product's backward pass takes the same number of FLOPs.
    """
    return 2 * rows * math.prod(weight)


def mlp(h: Shape, weights: Sequence[Shape], *others: Any, **named: Any) -> int:
    rows = math.prod(h[:-1])
    return sum(_product(rows, weight) for weight in weights)


def mlp_backward(
    grad: Shape,
    output: Shape,
    hidden: Sequence[Shape],
    h: Shape,
    weights: Sequence[Shape],
    biases: Sequence[Shape],
    activation: str | None,
    output_activation: str | None,
    with_grad_h: bool,
    with_grad_weights: bool,
    **named: Any,
) -> int:
    """Count the GEMMs for the gradients of all weights and layer inputs. The gradient of h is optional."""
    of_weights = mlp(h, weights) if with_grad_weights else 0
    return of_weights + mlp(h, weights if with_grad_h else weights[1:])


def linear_sample(h: Shape, weight: Shape, *others: Any, **named: Any) -> int:
    return _product(math.prod(h[:-1]), weight)


def linear_bernoulli_log_prob(h: Shape, weight: Shape, bias: Shape, x: Shape, *others: Any, **named: Any) -> int:
    return _product(_rows(h, x), weight)


def linear_bernoulli_log_prob_backward(
    grad: Shape,
    h: Shape,
    weight: Shape,
    bias: Shape,
    x: Shape,
    logits: Shape | None,
    with_grad_h: bool,
    with_grad_weight: bool,
    **named: Any,
) -> int:
    """Count the GEMMs for the gradients. If the logits were not saved, also count their recomputation."""
    recomputes = logits is None or logits[0] == 0
    return (recomputes + with_grad_h + with_grad_weight) * _product(_rows(h, x), weight)


def linear_bernoulli_log_prob_and_gradients(
    h: Shape,
    weight: Shape,
    bias: Shape,
    x: Shape,
    sample_weight: Shape | None,
    scale: float,
    with_grad_h: bool,
    with_grad_weight: bool,
    with_log_prob: bool,
    **named: Any,
) -> int:
    return (1 + with_grad_h + with_grad_weight) * _product(_rows(h, x), weight)


def _rows(h: Shape, x: Shape) -> int:
    return math.prod(torch.broadcast_shapes(h[:-1], x[:-1]))


FORMULAS: dict[str, Callable[..., int]] = {
    "mlp": mlp,
    "mlp_with_hidden": mlp,
    "mlp_backward": mlp_backward,
    "linear_bernoulli_sample": linear_sample,
    "linear_gaussian_rsample": linear_sample,
    "linear_bernoulli_log_prob": linear_bernoulli_log_prob,
    "linear_bernoulli_log_prob_and_logits": linear_bernoulli_log_prob,
    "linear_bernoulli_log_prob_backward": linear_bernoulli_log_prob_backward,
    "linear_bernoulli_log_prob_and_gradients": linear_bernoulli_log_prob_and_gradients,
}


def register_when_counted() -> None:
    """Register the formulas now if torch's FLOP counter is already imported, otherwise when it is imported.

    This function does not import the counter: the counter imports Triton, which would slow down the import of this
    package.
    """
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _Registering())


def _register(counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.wakesleep_ext, name))(formula)


class _Registering(MetaPathFinder):
    """Finds torch's FLOP counter through the other import finders, and registers the formulas after its import."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader = None if spec is None else spec.loader
        if loader is None:
            return None
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
