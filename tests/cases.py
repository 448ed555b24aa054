"""The table of ops and sample inputs that the tests walk.

A Case is an op with inputs of given shapes and dtypes. Inputs are drawn from a seed in float64 and rounded, so that
the same case at another dtype has the same inputs up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import wakesleep_ext as ws
from wakesleep_ext import ops, reference

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
KEY_SEED = 0x9E3779B97F4A7C15 - 2**64  # any 64 bits


@dataclass(frozen=True)
class Case:
    """An op and the shapes it is called with; every tensor argument is differentiable unless it is `x`."""

    op: str
    shapes: tuple[tuple[int, ...], ...]
    sample_shape: tuple[int, ...] = ()
    x_dtype: torch.dtype | None = None  # of the observation; that of the logits if None
    layout: str = "contiguous"

    def __str__(self) -> str:
        parts = [self.op, "x".join(str(list(shape)).replace(" ", "") for shape in self.shapes)]
        if self.sample_shape:
            parts.append(f"S={list(self.sample_shape)}".replace(" ", ""))
        if self.x_dtype is not None:
            parts.append(f"x:{self.x_dtype}".replace("torch.", ""))
        if self.layout != "contiguous":
            parts.append(self.layout)
        return "-".join(parts)

    @property
    def draws(self) -> bool:
        return "sample" in self.op

    def inputs(self, dtype: torch.dtype, device: str = "cpu", requires_grad: bool = False) -> tuple[Tensor, ...]:
        """The tensor arguments: mu, logvar, z or logits, x."""
        generator = torch.Generator().manual_seed(1234)
        tensors = []
        for index, shape in enumerate(self.shapes):
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            if self.op == "bernoulli_log_prob" and index == 1:
                value = torch.rand(shape, generator=generator, dtype=torch.float64)
                if self.x_dtype in (torch.bool, torch.uint8):
                    value = (value < 0.5).double()
                tensor = value.to(device, self.x_dtype or dtype)
            else:
                tensor = (3 * value if "bernoulli" in self.op else value).to(device, dtype)
            tensor = LAYOUTS[self.layout](tensor).detach()
            if requires_grad and tensor.is_floating_point():
                tensor.requires_grad_()
            tensors.append(tensor)
        return tuple(tensors)

    def function(self, module: Any = ops, key: Tensor | None = None) -> Callable[..., Any]:
        """The op as a function of its tensors alone: the draws have a key."""
        function = getattr(module, self.op)
        if not self.draws:
            return function

        def draw(*tensors: Tensor) -> Any:
            on_device = make_key(tensors[0].device) if key is None else key
            return function(*tensors, self.sample_shape, key=on_device)

        return draw

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return as_tuple(self.function()(*tensors))

    def reference(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return as_tuple(self.function(reference)(*tensors))


def make_key(device: torch.device | str = "cpu") -> Tensor:
    return ws.random.make_key(KEY_SEED, 12, device)


def as_tuple(result: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _packed(tensor: Tensor) -> Tensor:
    """One half of a packed [mu | logvar], as `chunk` gives it."""
    return torch.cat([tensor, torch.full_like(tensor, 7)], dim=-1).chunk(2, -1)[0]


def _offset_by_one(tensor: Tensor) -> Tensor:
    """At an address that is aligned to the element and to nothing more."""
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return storage[1:].copy_(tensor.flatten()).view(tensor.shape)


def _strided_event(tensor: Tensor) -> Tensor:
    """With gaps between the elements of an event."""
    return torch.stack([tensor, torch.full_like(tensor, 7)], dim=-1)[..., 0]


def _transposed(tensor: Tensor) -> Tensor:
    """With its leading dimensions in the opposite order in memory."""
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

# one small case of every op: gradients of higher order, compilation, opcheck
SMALL = (
    Case("gaussian_rsample", ((3, 5), (3, 5)), (2,)),
    Case("gaussian_rsample_log_prob", ((3, 5), (3, 5)), (2,)),
    Case("gaussian_log_prob", ((3, 5), (3, 5), (2, 3, 5))),
    Case("standard_gaussian_log_prob", ((2, 3, 5),)),
    Case("gaussian_kl", ((3, 5), (3, 5))),
    Case("bernoulli_log_prob", ((2, 3, 5), (3, 5))),
    Case("bernoulli_sample", ((3, 5),), (2,)),
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

SHAPES = (
    *(Case("gaussian_rsample_log_prob", pair) for pair in _PAIRS),
    *(Case("gaussian_rsample_log_prob", ((3, 13), (3, 13)), shape) for shape in _SAMPLE_SHAPES),
    *(Case("gaussian_rsample", ((3, 1030), (3, 1030)), shape) for shape in _SAMPLE_SHAPES),
    *(Case("gaussian_kl", pair) for pair in _PAIRS),
    *(Case("gaussian_log_prob", triple) for triple in _TRIPLES),
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
        replace(case, layout=layout)
        for layout in LAYOUTS
        if layout != "contiguous"
        for case in (
            Case("gaussian_rsample_log_prob", ((4, 3, 21), (4, 3, 21)), (2,)),
            Case("gaussian_log_prob", ((4, 3, 21), (4, 3, 21), (2, 4, 3, 21))),
            Case("standard_gaussian_log_prob", ((4, 3, 21),)),
            Case("gaussian_kl", ((4, 3, 21), (4, 3, 21))),
            Case("bernoulli_log_prob", ((2, 4, 3, 21), (4, 3, 21)), x_dtype=torch.uint8),
            Case("bernoulli_sample", ((4, 3, 21),), (2,)),
        )
    ),
)
