"""What is measured, as data: ops, passes, dtypes and shapes, and the candidates for each.

A shape is `[*S, B, D]`: a batch of B events of D variables, and S samples for each where a third number leads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from wakesleep_ext import ops
from wakesleep_ext.benchmark import distributions, eager

Candidate = Literal["fused", "eager", "distributions", "compile"]
CANDIDATES: tuple[Candidate, ...] = get_args(Candidate)

_PER_EVENT = ("log_prob", "kl")
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Op:
    """An op by the arrays that it has to move; from these, its least traffic follows."""

    name: str
    event: int
    """Variables of an event, D."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sampled: tuple[str, ...] = ()
    """The arrays that are `[*S, B, D]`. The others are `[B, D]`, and what is summed over the event `[*S, B]`."""
    gradients: tuple[str, ...] = ()
    """The inputs that are differentiated; none, no backward pass."""
    reread: tuple[str, ...] = ()
    """The inputs that the gradients depend on, and the backward pass has to read again."""

    @property
    def draws(self) -> bool:
        return "sample" in self.name


OPS = (
    Op(
        "bernoulli_log_prob",
        event=784,
        inputs=("logits", "x"),
        outputs=("log_prob",),
        sampled=("logits",),
        gradients=("logits",),
        reread=("logits", "x"),
    ),
    Op("bernoulli_sample", event=784, inputs=("logits",), outputs=("x",), sampled=("x",)),
    Op(
        "gaussian_rsample",
        event=64,
        inputs=("mu", "logvar"),
        outputs=("z",),
        sampled=("z",),
        gradients=("mu", "logvar"),
        reread=("logvar",),  # the noise follows from its key
    ),
    Op(
        "gaussian_rsample_log_prob",
        event=64,
        inputs=("mu", "logvar"),
        outputs=("z", "log_prob"),
        sampled=("z",),
        gradients=("mu", "logvar"),
        reread=("logvar",),
    ),
    Op(
        "gaussian_log_prob",
        event=64,
        inputs=("mu", "logvar", "z"),
        outputs=("log_prob",),
        sampled=("z",),
        gradients=("mu", "logvar"),
        reread=("mu", "logvar", "z"),
    ),
    Op(
        "standard_gaussian_log_prob",
        event=64,
        inputs=("z",),
        outputs=("log_prob",),
        sampled=("z",),
        gradients=("z",),
        reread=("z",),
    ),
    Op(
        "gaussian_kl",
        event=64,
        inputs=("mu", "logvar"),
        outputs=("kl",),
        gradients=("mu", "logvar"),
        reread=("mu", "logvar"),
    ),
)

_ROWS = (1, 20, 100, 1000, 10_000)
_MORE_ROWS = {
    ("cpu", 784): (),
    ("cpu", 64): (100_000,),
    ("cuda", 784): (100_000,),  # a GPU reaches its bandwidth at hundreds of megabytes
    ("cuda", 64): (100_000, 1_000_000),
}
_SAMPLES_AND_BATCH = (50, 100)


class Inputs(NamedTuple):
    """What a call gets, and what its backward pass starts from."""

    arguments: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]
    upstream: tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """An op with a pass, a dtype and a shape."""

    op: Op
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    x_dtype: torch.dtype | None = None
    """Of an observation or a draw of one, if not `dtype`."""
    backward: bool = False

    @property
    def pass_name(self) -> str:
        return "forward+backward" if self.backward else "forward"

    @property
    def dtype_name(self) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.x_dtype) if dtype]
        return ", x ".join(names)

    def __str__(self) -> str:
        return f"{self.op.name} {self.pass_name} {self.dtype_name} {list(self.shape)}"

    def shape_of(self, array: str) -> tuple[int, ...]:
        if array in _PER_EVENT:
            return self.shape[:-1]
        return self.shape if array in self.op.sampled else self.shape[-2:]

    def dtype_of(self, array: str) -> torch.dtype:
        if array in _PER_EVENT:
            return torch.float64 if self.dtype == torch.float64 else torch.float32
        return self.x_dtype if array == "x" and self.x_dtype else self.dtype

    def bytes_of(self, *arrays: str) -> int:
        return sum(prod(self.shape_of(array)) * self.dtype_of(array).itemsize for array in arrays)

    @property
    def bytes(self) -> int:
        """The least that has to be moved: inputs read and outputs written; for the backward pass, the gradients of
        the outputs and what else the result depends on read, the gradients of the inputs written."""
        op = self.op
        forward = self.bytes_of(*op.inputs, *op.outputs)
        return forward + self.backward * self.bytes_of(*op.outputs, *op.reread, *op.gradients)

    @property
    def footprint(self) -> int:
        """Bytes of all arrays of a call."""
        op = self.op
        return self.bytes_of(*op.inputs, *op.outputs) + self.backward * self.bytes_of(*op.outputs, *op.gradients)

    def inputs(self, device: torch.device | str) -> Inputs:
        """Random ones, the same at each call."""
        generator = torch.Generator(device).manual_seed(1234)

        def normal(array: str) -> Tensor:
            # no generator draws half types directly everywhere
            shape, dtype = self.shape_of(array), self.dtype_of(array)
            wide = torch.promote_types(dtype, torch.float32)
            value = torch.randn(shape, generator=generator, dtype=wide, device=device)
            if array == "x":
                value = (value > 0).to(wide)
            return (3 * value if array == "logits" else value).to(dtype)

        arguments = {array: normal(array) for array in self.op.inputs}
        if not self.backward:
            return Inputs(tuple(arguments.values()), (), ())
        parameters = tuple(arguments[array].requires_grad_() for array in self.op.gradients)
        return Inputs(tuple(arguments.values()), parameters, tuple(normal(array) for array in self.op.outputs))


def suite(device: str = "cpu", quick: bool = False) -> Iterator[Case]:
    """All cases for a kind of device, `"cpu"` or `"cuda"`; or, quick, the largest of each op and pass."""
    for op in OPS:
        rows = _ROWS + _MORE_ROWS[device, op.event]
        largest = (rows[-1], op.event)
        for backward in (False, True) if op.gradients else (False,):
            case = partial(Case, op, backward=backward)
            if not quick:
                for count in rows[:-1]:
                    yield case((count, op.event))
                if op.sampled:
                    yield case((*_SAMPLES_AND_BATCH, op.event))
                yield case(largest, torch.bfloat16)
                yield case(largest, torch.float64)
            yield case(largest)
            if "x" in op.inputs + op.outputs:
                yield case((rows[-1], op.event + 1))  # rows that no vector divides
                yield case(largest, torch.float32, torch.uint8)
                yield case(largest, torch.bfloat16, torch.uint8)


def function(case: Case, candidate: Candidate) -> Callable[..., Any]:
    """A candidate as a function of the input tensors alone.

    In half types the baselines compute in float32, as autocast has them do and as the ops do: log-likelihoods that
    are rounded to bfloat16 are off by as much as a nat.
    """
    if candidate == "fused":
        return _bind(ops, case)
    if candidate == "distributions":
        return _widened(_bind(distributions, case), case)
    by_hand = _widened(_bind(eager, case), case)
    if candidate == "eager":
        return by_hand

    def formula(*tensors: Tensor) -> Any:
        return by_hand(*tensors)

    torch.compiler.reset()  # or shape after shape would meet the recompilation limit, and run uncompiled
    # code on disk that was compiled for another number of threads does not count as the same, if the options tell
    return torch.compile(formula, fullgraph=True, dynamic=False, options={"cpp.threads": torch.get_num_threads()})


def _bind(module: ModuleType, case: Case) -> Callable[..., Any]:
    options: dict[str, Any] = {}
    if case.op.draws and len(case.shape) > 2:
        options["sample_shape"] = case.shape[:-2]
    if case.op.draws and case.x_dtype:
        options["dtype"] = case.x_dtype
    plain = getattr(module, case.op.name)
    return partial(plain, **options) if options else plain


def _widened(plain: Callable[..., Any], case: Case) -> Callable[..., Any]:
    if case.dtype not in _HALF:
        return plain

    dtypes = tuple(case.dtype_of(array) for array in case.op.outputs)

    def widened(*tensors: Tensor) -> Any:
        results = plain(*(tensor.float() if tensor.dtype in _HALF else tensor for tensor in tensors))
        if isinstance(results, Tensor):
            return results.to(dtypes[0])
        return tuple(result.to(dtype) for result, dtype in zip(results, dtypes, strict=True))

    return widened
