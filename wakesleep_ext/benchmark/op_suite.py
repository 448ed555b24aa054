"""Define the cases of the memory-bound ops as data: op, pass, dtype and shape, and their implementations.

A shape is `[B, D]` or `[S, B, D]`: B events of D variables each, and optionally S samples per event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from wakesleep_ext import ops, reference
from wakesleep_ext._op_table import OPS, Op, Sizes, values
from wakesleep_ext.benchmark.baselines import eager, torch_distributions
from wakesleep_ext.benchmark.measure import Call, Case, Labels, relative_error
from wakesleep_ext.benchmark.result import Record, Result, Row, ratio, rows
from wakesleep_ext.benchmark.suite import NONE, TIMES, Outcome, Section, Suite, shape

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Traffic:
    """The widths at which an op is measured, and its memory traffic beyond inputs and outputs."""

    widths: tuple[int, int]
    """Two values of D, the variables per event: a common one, and one that is not a multiple of the SIMD width."""
    gradients: tuple[str, ...] = ()
    """The inputs with gradients. If there are none, the op has no backward pass."""
    reread: tuple[str, ...] = ()
    """The inputs that the backward pass reads again, since gradients depend on them."""


_OBSERVED, _LATENT = (784, 785), (64, 50)
_MOMENTS = ("mu", "logvar")
_BOTH_MOMENTS = (*_MOMENTS, "prior_mu", "prior_logvar")
TRAFFIC = {
    "bernoulli_log_prob": Traffic(_OBSERVED, gradients=("logits",), reread=("logits", "x")),
    "bernoulli_sample": Traffic(_OBSERVED),
    "gaussian_rsample": Traffic(_LATENT, _MOMENTS, reread=("logvar",)),  # the key regenerates the noise
    "gaussian_rsample_log_prob": Traffic(_LATENT, _MOMENTS, reread=("logvar",)),
    "gaussian_log_prob": Traffic(_LATENT, _MOMENTS, reread=("mu", "logvar", "z")),
    "standard_gaussian_log_prob": Traffic(_LATENT, gradients=("z",), reread=("z",)),
    "gaussian_kl": Traffic(_LATENT, _MOMENTS, reread=_MOMENTS),
    "gaussian_kl_between": Traffic(_LATENT, _BOTH_MOMENTS, reread=_BOTH_MOMENTS),
}
"""Widths and memory traffic of each op. `OPS` defines its inputs and outputs."""

_ROWS = {"cpu": (1000, 100, 20, 1), "cuda": (100,)}
"""Batch sizes that fit in the cache. On a GPU, launch latency dominates for all of them, so one size is enough."""
_MOST_ROWS = {
    # larger than the cache; a GPU reaches its full bandwidth at hundreds of megabytes
    ("cpu", 784): 10_000,
    ("cpu", 64): 100_000,
    ("cuda", 784): 100_000,
    ("cuda", 64): 1_000_000,
}
_SAMPLES_AND_BATCH = (50, 100)


class Inputs(NamedTuple):
    """The arguments of a call, and the upstream gradients of its backward pass."""

    arguments: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]
    upstream: tuple[Tensor, ...]


@dataclass(frozen=True)
class OpCase(Case[Inputs]):
    """A benchmark case: an op, and its pass, dtypes and shape."""

    candidates: ClassVar[tuple[str, ...]] = ("fused", "eager", "distributions", "compile")

    op: Op
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    x_dtype: torch.dtype | None = None
    """The dtype of an observed or drawn x, if it differs from `dtype`."""
    backward: bool = False

    @property
    def labels(self) -> Labels:
        dtypes = [str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.x_dtype) if dtype]
        return {
            "op": self.op.name,
            "pass": "forward+backward" if self.backward else "forward",
            "dtype": ", x ".join(dtypes),
            "shape": list(self.shape),
        }

    @property
    def traffic(self) -> Traffic:
        return TRAFFIC[self.op.name]

    def shape_of(self, array: str) -> tuple[int, ...]:
        *samples, batch, event = self.shape
        return Sizes(tuple(samples), batch, event).shape({**self.op.inputs, **self.op.outputs}[array])

    def dtype_of(self, array: str) -> torch.dtype:
        if array == "x" and self.x_dtype:
            return self.x_dtype
        return self.op.output_dtype(array, self.dtype) if array in self.op.outputs else self.dtype

    def bytes_of(self, *arrays: str) -> int:
        return sum(prod(self.shape_of(array)) * self.dtype_of(array).itemsize for array in arrays)

    @property
    def bytes(self) -> int:
        """Bytes of inputs read and outputs written. The backward pass reads the outputs' gradients and `reread`, and
        writes the inputs' gradients."""
        op, traffic = self.op, self.traffic
        forward = self.bytes_of(*op.inputs, *op.outputs)
        return forward + self.backward * self.bytes_of(*op.outputs, *traffic.reread, *traffic.gradients)

    @property
    def footprint(self) -> int:
        op = self.op
        backward = self.bytes_of(*op.outputs, *self.traffic.gradients)
        return self.bytes_of(*op.inputs, *op.outputs) + self.backward * backward

    def inputs(self, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(1234)

        wide = torch.promote_types(self.dtype, torch.float32)  # not every random generator supports half types

        def values_of(array: str) -> Tensor:
            return values(array, self.shape_of(array), generator, wide).to(self.dtype_of(array))

        arguments = {array: values_of(array) for array in self.op.inputs}
        if not self.backward:
            return Inputs(tuple(arguments.values()), (), ())
        parameters = tuple(arguments[array].requires_grad_() for array in self.traffic.gradients)
        return Inputs(tuple(arguments.values()), parameters, tuple(map(values_of, self.op.outputs)))

    def calls(self, candidate: str, inputs: Sequence[Inputs]) -> list[Call]:
        function = self.function(candidate)
        if self.backward:
            return [partial(_forward_and_backward, function, *one) for one in inputs]
        return [partial(function, *one.arguments) for one in inputs]

    def function(self, candidate: str) -> Callable[..., Any]:
        """Return an implementation as a function whose only arguments are the input tensors.

        For half types, the baselines compute in float32, as autocast and our ops do. Rounding a log-likelihood to
        bfloat16 causes an error of up to a nat.
        """
        if candidate == "fused":
            return self._bind(ops)
        if candidate == "distributions":
            return self._in_float32(self._bind(torch_distributions))
        by_hand = self._in_float32(self._bind(eager))
        if candidate == "eager":
            return by_hand

        def formula(*tensors: Tensor) -> Any:
            return by_hand(*tensors)

        torch.compiler.reset()  # otherwise later shapes would reach the recompilation limit and run uncompiled
        # the thread count in the options keeps torch from reusing cached code compiled for another number of threads
        return torch.compile(formula, fullgraph=True, dynamic=False, options={"cpp.threads": torch.get_num_threads()})

    def error(self, candidate: str, inputs: Inputs, result: Any) -> float | None:
        """Return the error of log-densities and gradients.

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

    def _bind(self, module: ModuleType) -> Callable[..., Any]:
        options: dict[str, Any] = {}
        if self.op.draws and len(self.shape) > 2:
            options["sample_shape"] = self.shape[:-2]
        if self.op.draws and self.x_dtype:
            options["dtype"] = self.x_dtype
        return self.op.function(module, **options)

    def _in_float32(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        if self.dtype not in _HALF:
            return plain
        dtypes = [self.dtype_of(array) for array in self.op.outputs]

        def widened(*tensors: Tensor) -> Any:
            results = plain(*(tensor.float() if tensor.dtype in _HALF else tensor for tensor in tensors))
            if isinstance(results, Tensor):
                return results.to(dtypes[0])
            return tuple(result.to(dtype) for result, dtype in zip(results, dtypes, strict=True))

        return widened

    def _exact(self, inputs: Inputs, results: tuple[Tensor, ...]) -> list[Tensor]:
        """Return results and gradients in float64. If the op draws z, its noise is computed from the drawn z."""
        parameters = {id(tensor) for tensor in inputs.parameters}
        wide = [t.detach().double().requires_grad_(id(t) in parameters) for t in inputs.arguments]
        if self.op.draws:
            mu, logvar = wide
            sigma = (0.5 * logvar).exp()
            z = mu + sigma * ((results[0].double() - mu) / sigma).detach()
            outputs = (z, reference.gaussian_log_prob(mu, logvar, z))[: len(results)]
        else:
            outputs = _tuple(getattr(reference, self.op.name)(*wide))
        if not self.backward:
            return list(outputs)
        differentiated = [tensor for tensor in wide if tensor.requires_grad]
        return [*outputs, *torch.autograd.grad(outputs, differentiated, [u.double() for u in inputs.upstream])]


def cases(device: str = "cpu", quick: bool = False) -> list[OpCase]:
    """Return all cases for a device type, `"cpu"` or `"cuda"`. If quick, return only the largest float32 cases."""
    return list(_cases(device, quick))


def _cases(device: str, quick: bool) -> Iterator[OpCase]:
    for name, traffic in TRAFFIC.items():
        op, (width, odd) = OPS[name], traffic.widths
        most = _MOST_ROWS[device, width]
        observes = "x" in (*op.inputs, *op.outputs)
        has_samples = "S" in "".join((*op.inputs.values(), *op.outputs.values()))
        for backward in (False, True) if traffic.gradients else (False,):
            case = partial(OpCase, op, backward=backward)
            yield case((most, width))
            if quick:
                continue
            yield case((most, width), torch.bfloat16, torch.uint8 if observes else None)
            if observes:
                yield case((most, width), x_dtype=torch.uint8)
            yield case((most, odd))
            if has_samples:
                yield case((*_SAMPLES_AND_BATCH, width))
            for batch in _ROWS[device]:
                yield case((batch, width))


# ---- results ---------------------------------------------------------------------------------------------------------


def sections(records: Iterable[Record]) -> list[Section]:
    """Return a section with the cases larger than the cache, and a section with the cases that fit in the cache."""
    large: list[Row] = []
    small: list[Row] = []
    for row in rows(records):
        (small if next(iter(row.values()))["bandwidth_fraction"] is None else large).append(row)
    both = (("Beyond the cache:", large), ("Within the cache, where overhead counts:", small))
    return [(heading, part) for heading, part in both if part]


def headline(records: Iterable[Record]) -> list[Record]:
    """Return the float32 records with 100 events, and with the largest number of events that was measured."""
    widths = {op: traffic.widths[0] for op, traffic in TRAFFIC.items()}
    plain = [r for r in records if r["dtype"] == "float32" and r["shape"][1:] == [widths.get(r["op"])]]
    most = {r["op"]: max(other["shape"][0] for other in plain if other["op"] == r["op"]) for r in plain}
    return [r for r in plain if r["shape"][0] in (100, most[r["op"]])]


class Goal(NamedTuple):
    """A target for an op whose arrays exceed the cache, relative to its fastest baseline or to a copy."""

    op: str
    pass_name: str
    others: tuple[str, ...]
    at_least: float
    """The minimum speedup over the baselines in `others`. If `others` is empty, the minimum fraction of a copy's
    bandwidth."""
    with_avx2: float | None = None
    """The minimum on a CPU with AVX2 but without AVX-512, if it differs from `at_least`."""
    dtype: str = "float32"


_EAGER = ("eager", "distributions")
_BACKWARD = "forward+backward"
_HALF_AND_BYTES = "bfloat16, x uint8"

GOALS = {
    "cpu": (
        Goal("bernoulli_log_prob", "forward", _EAGER, 5, with_avx2=3),
        Goal("bernoulli_log_prob", "forward", ("compile",), 4),
        Goal("bernoulli_log_prob", "forward", (), 0.6),
        Goal("bernoulli_log_prob", _BACKWARD, _EAGER, 4),
        Goal("bernoulli_log_prob", _BACKWARD, ("compile",), 3.5),
        Goal("bernoulli_log_prob", _BACKWARD, (), 0.5),
        Goal("gaussian_rsample_log_prob", "forward", _EAGER, 20, with_avx2=8),
        Goal("gaussian_rsample_log_prob", "forward", ("compile",), 15),
        Goal("gaussian_log_prob", "forward", ("distributions",), 15),
        Goal("gaussian_log_prob", "forward", ("compile",), 1),
        Goal("gaussian_log_prob", "forward", (), 0.7),
        Goal("bernoulli_sample", "forward", ("eager",), 15, with_avx2=8),
        Goal("bernoulli_sample", "forward", ("compile",), 10),
    ),
    "cuda": (
        Goal("bernoulli_log_prob", "forward", (), 0.92),
        Goal("bernoulli_log_prob", "forward", _EAGER, 5),
        Goal("bernoulli_log_prob", "forward", ("compile",), 1),
        Goal("bernoulli_log_prob", "forward", _EAGER, 8, dtype=_HALF_AND_BYTES),
        Goal("bernoulli_log_prob", "forward", ("compile",), 1.3, dtype="float32, x uint8"),
        Goal("bernoulli_log_prob", _BACKWARD, _EAGER, 3.5),
        Goal("bernoulli_log_prob", _BACKWARD, ("compile",), 1),
        Goal("bernoulli_log_prob", _BACKWARD, _EAGER, 8, dtype=_HALF_AND_BYTES),
        Goal("bernoulli_sample", "forward", (), 0.7),
        Goal("gaussian_rsample", "forward", (), 0.7),
        Goal("gaussian_rsample", "forward", _EAGER, 3),
        Goal("gaussian_rsample_log_prob", "forward", (), 0.7),
        Goal("gaussian_rsample_log_prob", "forward", _EAGER, 4),
        Goal("gaussian_rsample_log_prob", _BACKWARD, _EAGER, 3),
        Goal("gaussian_log_prob", "forward", (), 0.92),
        Goal("gaussian_log_prob", "forward", _EAGER, 4),
        Goal("gaussian_log_prob", "forward", ("compile",), 1),
        Goal("gaussian_log_prob", _BACKWARD, _EAGER, 3),
        Goal("gaussian_log_prob", _BACKWARD, ("compile",), 1),
    ),
}
"""The goals by device type."""


def outcomes(result: Result) -> list[Outcome]:
    """Check the goals for the device on the largest case of each op, pass and dtype at the common width."""
    widths = {op: traffic.widths[0] for op, traffic in TRAFFIC.items()}
    large: dict[tuple[str, str, str], Row] = {}
    for row in sorted(rows(result["records"]), key=lambda row: next(iter(row.values()))["bytes"]):
        fused = row.get("fused")
        if fused and fused["bandwidth_fraction"] is not None and fused["shape"][1:] == [widths.get(fused["op"])]:
            # rows are sorted by bytes, so the largest one is kept
            large[fused["op"], fused["pass"], fused["dtype"]] = row
    found = []
    for goal in GOALS[result["machine"]["device"]]:
        wanted = goal.with_avx2 if goal.with_avx2 and result["machine"]["simd"] == "AVX2" else goal.at_least
        case = large.get((goal.op, goal.pass_name, goal.dtype))
        measured = _measured(goal, case) if case else None
        unit = TIMES if goal.others else " of copy speed"
        cells = {
            "op": f"`{goal.op}`",
            "pass": goal.pass_name,
            "dtype": goal.dtype,
            "versus": " and ".join(goal.others) or "a copy",
            "measured": NONE if measured is None else f"{measured:.{1 if goal.others else 2}f}{unit}",
            "goal": f"≥ {wanted:g}{unit}",
        }
        found.append(Outcome(cells, None if measured is None else measured >= wanted))
    return found


def _measured(goal: Goal, row: Row) -> float | None:
    if not goal.others:
        return row["fused"]["bandwidth_fraction"]
    found = [ratio(row, other) for other in goal.others]
    return None if None in found else min(value for value in found if value is not None)


def _label(record: Record) -> str:
    backward = " + backward" if record["pass"] == _BACKWARD else ""
    return f"{record['op']}{backward}\n{shape(record)}"


SUITE = Suite(
    noun="op",
    cases=cases,
    baselines=OpCase.candidates[1:],
    faster_than=("eager",),
    sections=sections,
    headline=headline,
    columns={
        "op": lambda record: f"`{record['op']}`",
        "pass": lambda record: record["pass"],
        "dtype": lambda record: record["dtype"],
        "shape": shape,
    },
    label=_label,
    yardstick=("of copy speed", lambda row: row["fused"]["bandwidth_fraction"], "{:.0%}"),
    goals=outcomes,
    goals_are_for={"cpu": "1 thread of a CPU with AVX-512 or AVX2", "cuda": "an NVIDIA H200"},
)


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
