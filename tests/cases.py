"""Sample inputs of the ops in `wakesleep_ext/_op_table.py`, which many tests iterate over.

A Case is an op with inputs of given shapes and dtypes. Inputs are drawn from a seed in float64 and rounded, so that
the same case in another dtype has the same inputs up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import wakesleep_ext as ws
from wakesleep_ext import ops, reference
from wakesleep_ext._op_table import OPS, Op, Sizes, values

KEY_SEED = 0x9E3779B97F4A7C15 - 2**64  # any 64 bits


@dataclass(frozen=True)
class Case:
    """An op and the shapes of its inputs."""

    op: str
    shapes: tuple[tuple[int, ...], ...]
    sample_shape: tuple[int, ...] = ()
    x_dtype: torch.dtype | None = None  # of the observation; that of the logits if None
    layout: str = "contiguous"
    recompute: bool | None = None  # for heads that have this option
    activation: str | None = None  # for layers

    def __str__(self) -> str:
        parts = [self.op, "x".join(str(list(shape)).replace(" ", "") for shape in self.shapes)]
        if self.sample_shape:
            parts.append(f"S={list(self.sample_shape)}".replace(" ", ""))
        if self.x_dtype is not None:
            parts.append(f"x:{self.x_dtype}".replace("torch.", ""))
        if self.layout != "contiguous":
            parts.append(self.layout)
        if self.recompute is not None:
            parts.append(f"recompute={self.recompute}")
        if self.activation is not None:
            parts.append(self.activation)
        return "-".join(parts)

    @property
    def row(self) -> Op:
        """The row of the op in the table."""
        return OPS[self.op]

    @property
    def draws(self) -> bool:
        return self.row.draws

    @property
    def is_binary(self) -> bool:
        """True if the op returns zeros and ones, which have no gradient."""
        return self.row.probability is not None

    def wide(self, rows: int, width: int) -> Case:
        """Return a case of the same op with this many rows and this width, and for heads this many features."""
        return replace(self, shapes=self.row.input_shapes(Sizes((), rows, width, width)), sample_shape=())

    def inputs(self, dtype: torch.dtype, device: str = "cpu", requires_grad: bool = False) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1234)
        tensors = []
        for name, shape in zip(self.row.inputs, self.shapes, strict=True):
            value, as_dtype = values(name, shape, generator), dtype
            if name == "x" and self.x_dtype is not None:
                as_dtype = self.x_dtype
            if name == "x" and as_dtype.is_floating_point:  # between 0 and 1
                value = torch.rand(shape, generator=generator, dtype=torch.float64)
            tensor = LAYOUTS[self.layout](value.to(device, as_dtype)).detach()
            tensors.append(tensor.requires_grad_(requires_grad and tensor.is_floating_point()))
        return tuple(tensors)

    def function(self, module: Any = ops, key: Tensor | None = None) -> Callable[..., Any]:
        """Return the op as a function of its tensors only; draws get a key."""
        options = dict(self.row.options)
        if "activation" in options:
            options["activation"] = self.activation
        if self.recompute is not None:
            options["recompute"] = self.recompute
        if self.row.takes_sample_shape:
            options["sample_shape"] = self.sample_shape
        function = self.row.function(module, **options)
        if not self.draws:
            return function
        return lambda *tensors: function(*tensors, key=make_key(tensors[0].device) if key is None else key)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return as_tuple(self.function()(*tensors))

    def reference(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return as_tuple(self.function(reference)(*tensors))


def make_key(device: torch.device | str = "cpu") -> Tensor:
    return ws.random.make_key(KEY_SEED, 12, device)


def thorough(value: Any) -> Any:
    """Make a test parameter that only the thorough tier runs."""
    return pytest.param(value, marks=pytest.mark.thorough)


def as_tuple(result: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _packed(tensor: Tensor) -> Tensor:
    """Return half of a packed [mu | logvar], as `chunk` does."""
    return torch.cat([tensor, torch.full_like(tensor, 7)], dim=-1).chunk(2, -1)[0]


def _offset_by_one(tensor: Tensor) -> Tensor:
    """Return a copy that is aligned to its elements only."""
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return storage[1:].copy_(tensor.flatten()).view(tensor.shape)


def _strided_event(tensor: Tensor) -> Tensor:
    """Return a copy with gaps between the elements of an event."""
    return torch.stack([tensor, torch.full_like(tensor, 7)], dim=-1)[..., 0]


def _transposed(tensor: Tensor) -> Tensor:
    """Return a copy whose leading dimensions are reversed in memory."""
    leading = list(range(tensor.dim() - 1))
    order = [*reversed(leading), tensor.dim() - 1]
    return tensor.permute(order).contiguous().permute(order)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "packed": _packed,
    "offset": _offset_by_one,
    "strided": _strided_event,
    "transposed": _transposed,
}

# the ops whose cases are not here: a view, a draw of bytes from bytes, and an update in place
TESTED_ELSEWHERE = {
    "gaussian_parameters": "test_gradients.py",
    "binarize": "test_binarize.py",
    "adam_": "test_adam.py",
}
_SMALL = Sizes((2,), batch=3, event=5, features=4)

# one small case of every op, or a few: gradients of higher order, compilation, opcheck
SMALL = (
    *(
        Case(
            name,
            op.input_shapes(_SMALL),
            _SMALL.samples if op.takes_sample_shape else (),
            activation=op.options.get("activation"),
        )
        for name, op in OPS.items()
        if name not in TESTED_ELSEWHERE
    ),
    *(Case("linear", OPS["linear"].input_shapes(_SMALL), activation=activation) for activation in (None, "relu")),
    Case("linear_bernoulli_log_prob", OPS["linear_bernoulli_log_prob"].input_shapes(_SMALL), recompute=True),
)

# every op at the shapes that break kernels: one element, odd widths, rows wider than a tile or worth a whole block of
# threads, empty batches and events, broadcasting to every side, many samples, and tensors that are laid out otherwise
_PAIRS = (
    ((1,), (1,)),
    ((7,), (7,)),
    ((4, 64), (4, 64)),
    ((3, 785), (3, 785)),
    ((2, 3000), (2, 3000)),
    ((3, 3333), (3, 3333)),
    ((0, 5), (0, 5)),
    ((3, 0), (3, 0)),
    ((2, 1, 9), (4, 9)),
    ((5, 9), (9,)),
    ((9,), (3, 2, 9)),
)
_SAMPLE_SHAPES = ((), (3,), (2, 3), (0,), (70,))
_TRIPLES = (
    ((1,), (1,), (1,)),
    ((4, 64), (4, 64), (4, 64)),
    ((3, 785), (3, 785), (2, 3, 785)),
    ((2, 2050), (2, 2050), (2, 2050)),
    ((3, 3333), (3, 3333), (3, 3333)),
    ((0, 5), (0, 5), (3, 0, 5)),
    ((3, 0), (3, 0), (3, 0)),
    ((9,), (9,), (150, 9)),  # many rows for one of the parameters
    ((5, 1, 9), (5, 4, 9), (2, 5, 4, 9)),
    ((5, 4, 9), (4, 9), (9,)),  # fewer rows than the parameters have
    ((4, 9), (4, 9), (5, 1, 9)),
)


def _batch(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*(shape[:-1] for shape in shapes)))


_QUADRUPLES = (
    *((*pair, *pair) for pair in _PAIRS),
    ((150, 9), (9,), (9,), (9,)),  # many rows for one prior
    ((9,), (9,), (150, 9), (150, 9)),  # and for one Gaussian
    ((2, 1, 9), (4, 9), (2, 1, 9), (9,)),
    ((5, 1, 9), (4, 9), (3, 1, 1, 9), (3, 5, 1, 9)),  # more rows on both sides
)

# h, weight, bias and x of a head
_HEADS = (
    ((1,), (1, 1), (1,), (1,)),
    ((7,), (9, 7), (9,), (9,)),
    ((70, 5), (13, 5), (13,), (70, 13)),  # several pieces of a sum over rows
    ((4, 3, 20), (785, 20), (785,), (3, 785)),
    ((2, 5), (3333, 5), (3333,), (2, 3333)),
    ((0, 5), (7, 5), (7,), (0, 7)),
    ((3, 0), (7, 0), (7,), (3, 7)),  # no features
    ((3, 5), (0, 5), (0,), (3, 0)),
    ((2, 1, 4, 5), (9, 5), (9,), (3, 1, 9)),
    ((5,), (9, 5), (9,), (3, 2, 9)),  # x has rows of its own
)

SHAPES = (
    *(Case("gaussian_rsample_log_prob", pair) for pair in _PAIRS),
    *(Case("gaussian_rsample_log_prob", ((3, 13), (3, 13)), shape) for shape in _SAMPLE_SHAPES),
    *(Case("gaussian_rsample", ((3, 1030), (3, 1030)), shape) for shape in _SAMPLE_SHAPES),
    *(Case("gaussian_kl", pair) for pair in _PAIRS),
    *(Case("gaussian_kl_between", quadruple) for quadruple in _QUADRUPLES),
    *(Case("gaussian_log_prob", triple) for triple in _TRIPLES),
    *(Case("gaussian_log_prob_sum", (*triple, _batch(*triple))) for triple in _TRIPLES),
    Case("gaussian_log_prob_sum", ((300, 64), (300, 64), (2, 300, 64), (300,))),  # several parts of a sum
    Case("gaussian_log_prob_sum", ((4, 9), (4, 9), (5, 4, 9), ())),
    *(Case("standard_gaussian_log_prob", (pair[0],)) for pair in _PAIRS),
    *(Case("bernoulli_log_prob", pair) for pair in _PAIRS),
    Case("bernoulli_log_prob", ((2, 3, 4, 21), (3, 1, 21))),
    Case("bernoulli_log_prob", ((21,), (150, 21))),  # a bias alone, seen by many rows
    *(
        Case("bernoulli_log_prob", ((2, 3, 37), (3, 37)), x_dtype=x_dtype)
        for x_dtype in (torch.bool, torch.uint8, torch.float32, torch.float64, torch.bfloat16)
    ),
    *(Case("bernoulli_sample", (pair[0],)) for pair in _PAIRS),
    *(Case("bernoulli_sample", ((3, 13),), shape) for shape in _SAMPLE_SHAPES),
    *(
        Case("linear_bernoulli_log_prob", shapes, recompute=recompute)
        for shapes in _HEADS
        for recompute in (True, False)
    ),
    *(
        Case("linear_bernoulli_log_prob", ((2, 3, 5), (37, 5), (37,), (3, 37)), x_dtype=x_dtype)
        for x_dtype in (torch.bool, torch.uint8, torch.float32, torch.float64, torch.bfloat16)
    ),
    *(Case("linear_bernoulli_log_prob_sum", (*shapes, shapes[0][:-1])) for shapes in _HEADS[:-1]),
    Case("linear_bernoulli_log_prob_sum", ((2, 3, 5), (9, 5), (9,), (3, 9), (2, 1))),  # a weight for many rows
    Case("linear_bernoulli_log_prob_sum", ((2, 3, 5), (9, 5), (9,), (3, 9), ()), x_dtype=torch.uint8),
    *(Case("linear", shapes[:3], activation="tanh") for shapes in _HEADS),
    *(Case("linear", ((2, 3, 5), (37, 5), (37,)), activation=activation) for activation in (None, "relu", "sigmoid")),
    *(
        Case("mlp", (h, (13, *h[-1:]), (13,), (width, 13), (width,)), activation=activation)
        for h in ((1,), (7,), (70, 5), (4, 3, 20), (0, 5), (3, 0), (2, 1, 4, 5))
        for width, activation in ((785, "tanh"), (1, "relu"), (0, None))
    ),
    *(Case("linear_bernoulli_sample", shapes[:3]) for shapes in _HEADS),
    *(
        Case("linear_gaussian_rsample", (h, (2 * K, *h[-1:]), (2 * K,)), sample_shape)
        for h, K, sample_shape in (
            ((1,), 1, ()),
            ((7,), 9, (4,)),
            ((70, 5), 13, (3,)),
            ((4, 3, 20), 785, ()),
            ((2, 1, 4, 5), 9, (2, 3)),
            ((3, 5), 6, (0,)),
            ((0, 5), 7, (3,)),
            ((3, 0), 7, (2,)),
            ((3, 5), 0, ()),
        )
    ),
    *(
        replace(case, layout=layout)
        for layout in LAYOUTS
        if layout != "contiguous"
        for case in (
            Case("gaussian_rsample_log_prob", ((4, 3, 21), (4, 3, 21)), (2,)),
            Case("gaussian_log_prob", ((4, 3, 21), (4, 3, 21), (2, 4, 3, 21))),
            Case("gaussian_log_prob_sum", ((4, 3, 21), (4, 3, 21), (2, 4, 3, 21), (4, 3))),
            Case("standard_gaussian_log_prob", ((4, 3, 21),)),
            Case("gaussian_kl", ((4, 3, 21), (4, 3, 21))),
            Case("gaussian_kl_between", 4 * ((4, 3, 21),)),
            Case("bernoulli_log_prob", ((2, 4, 3, 21), (4, 3, 21)), x_dtype=torch.uint8),
            Case("bernoulli_sample", ((4, 3, 21),), (2,)),
            Case("linear_bernoulli_log_prob", ((2, 4, 3, 5), (21, 5), (21,), (4, 3, 21)), x_dtype=torch.uint8),
            Case("linear_bernoulli_log_prob_sum", ((4, 3, 5), (21, 5), (21,), (4, 3, 21), (4, 3))),
            Case("linear", ((4, 3, 5), (21, 5), (21,)), activation="tanh"),
            Case("mlp", ((4, 3, 5), (21, 5), (21,), (9, 21), (9,)), activation="tanh"),
            Case("linear_bernoulli_sample", ((4, 3, 5), (21, 5), (21,))),
            Case("linear_gaussian_rsample", ((4, 3, 5), (42, 5), (42,)), (2,)),
        )
    ),
)
