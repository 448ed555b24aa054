"""A table of all ops: their inputs, their outputs, and how to call them.

The tests, `wakesleep selftest` and `wakesleep bench` read this table. The reference implementation of an op is the
function of the same name in :mod:`wakesleep_ext.reference`.

Letters name the dimensions: S for samples, B for batch, D for event, 2D for a packed pair of events, H for features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Sizes(NamedTuple):
    """The size of each dimension; S may stand for several dimensions."""

    samples: tuple[int, ...]
    batch: int
    event: int
    features: int = 0

    def shape(self, dimensions: str) -> tuple[int, ...]:
        """Return the shape for a string of dimension letters, such as `S B D`."""
        sizes = {"B": self.batch, "D": self.event, "2D": 2 * self.event, "H": self.features}
        return sum((self.samples if d == "S" else (sizes[d],) for d in dimensions.split()), ())


@dataclass(frozen=True, eq=False)
class Op:
    """A public function of :mod:`wakesleep_ext.ops`."""

    name: str
    inputs: Mapping[str, str]
    """The tensor arguments in order: name and dimension letters."""
    outputs: Mapping[str, str]
    """The results in order: name and dimension letters. For an in-place op, these are the inputs that it modifies."""
    draws: bool = False
    """True if the op draws random numbers and has a `key` argument."""
    probability: Callable[..., Tensor] | None = None
    """Computes the probability of a 1 from the inputs. None if the result is not a Bernoulli draw."""
    moments: Callable[..., Sequence[Tensor]] = lambda mu, logvar: (mu, logvar)
    """Computes mu and logvar of a Gaussian draw from the inputs."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments for calling the op in tests and benchmarks, except `key` and `sample_shape`."""
    call: Callable[..., Any] | None = None
    """Calls the function with the input tensors and returns its results. None if the function itself accepts them."""
    dtypes: tuple[torch.dtype, ...] = FLOATING
    """The supported dtypes of the inputs."""

    @property
    def takes_sample_shape(self) -> bool:
        return self.draws and "S" in "".join(self.outputs.values()) and "S" not in "".join(self.inputs.values())

    @property
    def is_differentiable(self) -> bool:
        return self.probability is None and not self.name.endswith("_")

    def input_shapes(self, sizes: Sizes) -> tuple[tuple[int, ...], ...]:
        return tuple(map(sizes.shape, self.inputs.values()))

    def output_dtype(self, output: str, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of a result: the dtype of the inputs, but at least float32 if it is a sum over the event."""
        return dtype if "D" in self.outputs[output] else torch.promote_types(dtype, torch.float32)

    def function(self, module: ModuleType, **options: Any) -> Callable[..., Any]:
        """Return a module's implementation of the op as a function whose only arguments are the input tensors."""
        plain: Callable[..., Any] = getattr(module, self.name)
        if self.call is not None:
            plain = partial(self.call, plain)
        return partial(plain, **options) if options else plain


def values(name: str, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return random values in the range of the named argument, on the generator's device."""
    normal = torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)
    match name:
        case "logits":
            return 3 * normal  # includes probabilities close to 0 and 1
        case "weight" | "next_weight":
            return normal / shape[-1] ** 0.5  # so that activations do not saturate, and rounding errors do not grow
        case "x":
            return (normal > 0).to(dtype)
        case "grey":
            return (128 + 64 * normal).round().clamp(0, 255)
        case "exp_avg_sq":
            return normal.square()
    return normal


def _call_mlp(function: Callable[..., Tensor], h: Tensor, *layers: Tensor, **options: Any) -> Tensor:
    return function(h, layers[::2], layers[1::2], **options)


def _call_adam(function: Callable[..., None], p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    step, lr = (torch.tensor(number, dtype=torch.float64, device=p.device) for number in (3.0, 0.01))
    function([p], [g], [m], [v], step, lr)
    return p, m, v


_MOMENTS = {"mu": "B D", "logvar": "B D"}
_LAYER = {"h": "S B H", "weight": "D H", "bias": "D"}

OPS = {
    op.name: op
    for op in (
        Op("gaussian_parameters", {"packed": "B 2D"}, _MOMENTS),
        Op("gaussian_rsample", _MOMENTS, {"z": "S B D"}, draws=True),
        Op("gaussian_rsample_log_prob", _MOMENTS, {"z": "S B D", "log_prob": "S B"}, draws=True),
        Op("gaussian_log_prob", {**_MOMENTS, "z": "S B D"}, {"log_prob": "S B"}),
        Op("gaussian_log_prob_sum", {**_MOMENTS, "z": "S B D", "sample_weight": "S B"}, {"sum": ""}),
        Op("standard_gaussian_log_prob", {"z": "S B D"}, {"log_prob": "S B"}),
        Op("gaussian_kl", _MOMENTS, {"kl": "B"}),
        Op("gaussian_kl_between", {**_MOMENTS, "prior_mu": "B D", "prior_logvar": "B D"}, {"kl": "B"}),
        Op("bernoulli_log_prob", {"logits": "S B D", "x": "B D"}, {"log_prob": "S B"}),
        Op("bernoulli_sample", {"logits": "B D"}, {"x": "S B D"}, draws=True, probability=torch.sigmoid),
        Op(
            "binarize",
            {"grey": "B D"},
            {"x": "B D"},
            draws=True,
            probability=lambda grey: grey / 255,
            dtypes=(torch.uint8,),
        ),
        Op("linear", _LAYER, {"y": "S B D"}, options={"activation": "tanh"}),
        Op(
            "mlp",
            {**_LAYER, "next_weight": "D D", "next_bias": "D"},
            {"y": "S B D"},
            options={"activation": "tanh", "output_activation": "sigmoid"},
            call=_call_mlp,
        ),
        Op("linear_bernoulli_log_prob", {**_LAYER, "x": "B D"}, {"log_prob": "S B"}),
        Op("linear_bernoulli_log_prob_sum", {**_LAYER, "x": "B D", "sample_weight": "S B"}, {"sum": ""}),
        Op(
            "linear_bernoulli_sample",
            _LAYER,
            {"x": "S B D"},
            draws=True,
            probability=lambda h, weight, bias: linear(h, weight, bias).sigmoid(),
        ),
        Op(
            "linear_gaussian_rsample",
            {"h": "B H", "weight": "2D H", "bias": "2D"},
            {"z": "S B D"},
            draws=True,
            moments=lambda h, weight, bias: linear(h, weight, bias).chunk(2, -1),
        ),
        Op(
            "adam_",
            {"parameter": "B D", "gradient": "B D", "exp_avg": "B D", "exp_avg_sq": "B D"},
            {"parameter": "B D", "exp_avg": "B D", "exp_avg_sq": "B D"},
            call=_call_adam,
        ),
    )
}
"""All public ops, keyed by name."""
