"""Define a case of an op: its inputs, its implementations, its memory traffic and its error.

A shape is `[B, D]` or `[S, B, D]`: B events of D variables each, and optionally S samples per event. Layers and heads
also have H inputs: `[B, H, D]` or `[S, B, H, D]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wakesleep_ext import ops, reference
from wakesleep_ext._op_table import Op, Sizes, values
from wakesleep_ext.benchmark.baselines import eager, torch_distributions, torch_fused
from wakesleep_ext.benchmark.instruments import Call, relative_error
from wakesleep_ext.benchmark.measure import Case, Labels

_HALF = (torch.bfloat16, torch.float16)
_BASELINES = {"eager": eager, "distributions": torch_distributions, "torch fused": torch_fused}


@dataclass(frozen=True, eq=False)
class Measured:
    """An op as it is measured: its sizes, its baselines and its memory traffic."""

    op: Op
    widths: Sequence[tuple[int, ...]]
    """Sizes per event, `(D,)` or `(H, D)`. The first one is the common width."""
    rows: Mapping[str, tuple[int, ...]]
    """Numbers of events, keyed by device type. The last one is the largest."""
    name: str = ""
    """The name in tables and for `--op`; the name of the op by default."""
    gradients: tuple[str, ...] = ()
    """The inputs with gradients. If there are none, only the forward pass is measured."""
    reread: tuple[str, ...] = ()
    """The inputs that the backward pass reads again, since gradients depend on them."""
    baselines: tuple[str, ...] = ("eager", "distributions", "compile")
    variants: Sequence[Mapping[str, Any]] = ()
    """Fields of :class:`OpCase` that differ from float32 without autocast; measured at the largest size."""
    dtype: torch.dtype = torch.float32
    at_every_width: bool = False
    """True to measure every width at every number of events, rather than at the largest alone."""
    ours: ModuleType = ops
    """The module of our implementation."""
    bind: Callable[..., Callable[[], Any]] = partial
    """Returns a call from a function and the input tensors."""

    @property
    def label(self) -> str:
        return self.name or self.op.name

    @property
    def multiplies(self) -> bool:
        """True if the op multiplies matrices. Its shape then has H inputs, and it affects autocast."""
        return "weight" in self.op.inputs

    @property
    def observes(self) -> bool:
        return "x" in (*self.op.inputs, *self.op.outputs)

    @property
    def broadcasts_samples(self) -> bool:
        """True if some arrays have samples, and others only events."""
        dimensions = [*self.op.inputs.values(), *self.op.outputs.values()]
        return any("S" in d for d in dimensions) and any(d.startswith("B") for d in dimensions)

    def num_events(self, shape: Sequence[int]) -> int:
        return prod(shape[: -len(self.widths[0])])


class Inputs(NamedTuple):
    """The arguments of a call, and the upstream gradients of its backward pass."""

    arguments: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]
    upstream: tuple[Tensor, ...]


@dataclass(frozen=True)
class OpCase(Case[Inputs]):
    """A benchmark case: an op, and its pass, dtypes and shape."""

    measured: Measured
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    """The dtype of the inputs. Under autocast, the inputs are float32, and this is the dtype of GEMMs."""
    x_dtype: torch.dtype | None = None
    """The dtype of an observed or drawn x, if it differs from `dtype`."""
    autocast: bool = False
    backward: bool = False
    compiles: bool = True
    """False to leave out `torch.compile`, which takes seconds to compile a case."""

    @property
    def op(self) -> Op:
        return self.measured.op

    @property
    def candidates(self) -> tuple[str, ...]:
        return ("fused", *(name for name in self.measured.baselines if name != "compile" or self.compiles))

    @property
    def arithmetic_bound(self) -> bool:
        return self.measured.multiplies

    @property
    def labels(self) -> Labels:
        dtypes = [str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.x_dtype) if dtype]
        return {
            "op": self.measured.label,
            "pass": "forward+backward" if self.backward else "forward",
            "dtype": ", x ".join(dtypes) + ", autocast" * self.autocast,
            "shape": list(self.shape),
        }

    def shape_of(self, array: str) -> tuple[int, ...]:
        *outer, event = self.shape
        features = outer.pop() if self.measured.multiplies else 0
        *samples, batch = outer
        return Sizes(tuple(samples), batch, event, features).shape({**self.op.inputs, **self.op.outputs}[array])

    def dtype_of(self, array: str) -> torch.dtype:
        if array == "x" and self.x_dtype:
            return self.x_dtype
        if array in self.op.outputs:
            return self.op.output_dtype(array, self.dtype)
        return torch.float32 if self.autocast else self.dtype

    def bytes_of(self, *arrays: str) -> int:
        return sum(prod(self.shape_of(array)) * self.dtype_of(array).itemsize for array in arrays)

    @property
    def bytes(self) -> int:
        """Bytes of inputs read and outputs written. The backward pass reads the outputs' gradients and `reread`, and
        writes the inputs' gradients."""
        op, measured = self.op, self.measured
        forward = self.bytes_of(*op.inputs, *op.outputs)
        return forward + self.backward * self.bytes_of(*op.outputs, *measured.reread, *measured.gradients)

    @property
    def footprint(self) -> int:
        op = self.op
        backward = self.bytes_of(*op.outputs, *self.measured.gradients)
        return self.bytes_of(*op.inputs, *op.outputs) + self.backward * backward

    def inputs(self, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(1234)
        wide = torch.promote_types(self.dtype, torch.float32)  # not every random generator supports half types

        def values_of(array: str) -> Tensor:
            return values(array, self.shape_of(array), generator, wide).to(self.dtype_of(array))

        arguments = {array: values_of(array) for array in self.op.inputs}
        if not self.backward:
            return Inputs(tuple(arguments.values()), (), ())
        parameters = tuple(arguments[array].requires_grad_() for array in self.measured.gradients)
        return Inputs(tuple(arguments.values()), parameters, tuple(map(values_of, self.op.outputs)))

    def calls(self, candidate: str, inputs: Sequence[Inputs]) -> list[Call]:
        function = self.function(candidate)
        if self.backward:
            return [partial(_forward_and_backward, function, *one) for one in inputs]
        return [self.measured.bind(function, *one.arguments) for one in inputs]

    def function(self, candidate: str) -> Callable[..., Any]:
        """Return an implementation as a function whose only arguments are the input tensors.

        For half types, the baselines compute densities and draws in float32, as autocast and our ops do. Rounding a
        log-likelihood to bfloat16 causes an error of up to a nat. GEMMs stay in the half type, where they are fastest.
        """
        if candidate == "fused":
            return self._chosen(self.measured.ours)
        if candidate != "compile":
            return self._chosen(_BASELINES[candidate])
        by_hand = self._chosen(eager)

        def formula(*tensors: Tensor) -> Any:
            return by_hand(*tensors)

        torch.compiler.reset()  # otherwise later shapes would reach the recompilation limit and run uncompiled
        # the thread count in the options keeps torch from reusing cached code compiled for another number of threads
        return torch.compile(formula, fullgraph=True, dynamic=False, options={"cpp.threads": torch.get_num_threads()})

    def error(self, candidate: str, inputs: Inputs, result: Any) -> float | None:
        """Return the error of densities, layers, updates and gradients.

        The draws themselves are random, but every other result is a deterministic function of the draws, so only these
        other results are compared.

        Return None if the op returns only draws. Also return None if z is rounded to a half type, since the rounded z
        does not determine the other results.
        """
        results, gradients = result if self.backward else (_tuple(result), ())
        skipped = 1 if self.op.draws else 0
        found = [*results, *gradients][skipped:]
        if not found or (self.op.draws and self.dtype in _HALF):
            return None
        return relative_error(found, self._exact(inputs, results)[skipped:])

    def _chosen(self, module: ModuleType) -> Callable[..., Any]:
        """Return a module's implementation with the options and dtypes of this case."""
        options = dict(self.op.options)
        samples = self.shape[: -1 - len(self.measured.widths[0])]
        if self.op.takes_sample_shape and samples:
            options["sample_shape"] = samples
        if self.op.draws and self.x_dtype:
            options["dtype"] = self.x_dtype
        function = self.op.function(module, **options)
        if self.autocast:
            return _under_autocast(function, self.dtype)
        if self.dtype in _HALF and module in _BASELINES.values() and not self.measured.multiplies:
            return _in_float32(function, [self.dtype_of(array) for array in self.op.outputs])
        return function

    def _exact(self, inputs: Inputs, results: tuple[Tensor, ...]) -> list[Tensor]:
        """Return results and gradients in float64. If the op draws z, its noise is computed from the drawn z."""
        parameters = {id(tensor) for tensor in inputs.parameters}
        wide = [t.detach().double().requires_grad_(id(t) in parameters) for t in inputs.arguments]
        if self.op.draws:
            mu, logvar = self.op.moments(*wide)
            sigma = (0.5 * logvar).exp()
            z = mu + sigma * ((results[0].double() - mu) / sigma).detach()
            outputs = (z, reference.gaussian_log_prob(mu, logvar, z))[: len(results)]
        else:
            outputs = _tuple(self.measured.bind(self.op.function(reference, **self.op.options), *wide)())
        if not self.backward:
            return list(outputs)
        differentiated = [tensor for tensor in wide if tensor.requires_grad]
        return [*outputs, *torch.autograd.grad(outputs, differentiated, [u.double() for u in inputs.upstream])]


def _under_autocast(function: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    def cast(*tensors: Tensor) -> Any:
        with torch.autocast(tensors[0].device.type, dtype):
            return function(*tensors)

    return cast


def _in_float32(plain: Callable[..., Any], dtypes: Iterable[torch.dtype]) -> Callable[..., Any]:
    dtypes = tuple(dtypes)

    def widened(*tensors: Tensor) -> Any:
        results = plain(*(tensor.float() if tensor.dtype in _HALF else tensor for tensor in tensors))
        if isinstance(results, Tensor):
            return results.to(dtypes[0])
        return tuple(result.to(dtype) for result, dtype in zip(results, dtypes, strict=True))

    return widened


def _forward_and_backward(
    function: Callable[..., Any],
    arguments: tuple[Tensor, ...],
    parameters: tuple[Tensor, ...],
    upstream: tuple[Tensor, ...],
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the results, and the gradients of the parameters."""
    results = _tuple(function(*arguments))
    return results, torch.autograd.grad(results, parameters, upstream)


def _tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)
