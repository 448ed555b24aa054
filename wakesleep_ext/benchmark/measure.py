"""Time implementations alternately, and report the median, spread and error of each.

A block is a series of calls that takes at least `Case.block_seconds`. Blocks of different implementations alternate, so
that other load on the computer affects all implementations alike. A large case cycles through several sets of inputs,
so that the arrays of a call have left the last-level cache before the call starts. The results of a call are kept
until its inputs are used again, so that output memory is cold as well. A small case has one set of inputs, which
stays in cache as in practice. The time of a small case is mostly overhead.
"""

from __future__ import annotations

import gc
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import cycle, repeat
from time import perf_counter
from typing import Any, ClassVar, Generic, NamedTuple, TypedDict, TypeVar

import torch

from wakesleep_ext.benchmark.instruments import (
    CACHES_FULL,
    Call,
    Copy,
    duration,
    last_level_cache,
    launches,
    median_and_spread,
    peak_bytes,
)
from wakesleep_ext.benchmark.result import Record

Inputs = TypeVar("Inputs")
Labels = TypedDict("Labels", {"op": str, "pass": str, "dtype": str, "shape": list[int]})

_ROUNDS = (5, 200)  # minimum, maximum
_BANDWIDTH_BOUND_FROM = {"cpu": 2**22, "cuda": 2**25}
"""A call is memory-bound if its arrays have at least this many bytes in total."""


class Case(ABC, Generic[Inputs]):
    """A benchmark case. It provides the inputs, a callable for each implementation, and the error of each result."""

    block_seconds: ClassVar[float] = 1e-2
    """Minimum duration of a block."""

    @property
    @abstractmethod
    def candidates(self) -> tuple[str, ...]:
        """Names of the implementations; the first is ours."""

    @property
    def arithmetic_bound(self) -> bool:
        """True if arithmetic dominates at every array size. Times are then not compared with the time of a copy."""
        return False

    @property
    @abstractmethod
    def labels(self) -> Labels:
        """Labels that identify the case in a result."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """The minimum memory traffic of a call, in bytes."""

    @property
    @abstractmethod
    def footprint(self) -> int:
        """The total size of all inputs and outputs of a call, in bytes."""

    @abstractmethod
    def inputs(self, device: torch.device) -> Inputs:
        """Return the inputs of a call in new memory. Their values are always the same."""

    @abstractmethod
    def calls(self, candidate: str, inputs: Sequence[Inputs]) -> list[Call]:
        """Return callables that run an implementation, one for each set of inputs."""

    def implementation(self, candidate: str, inputs: Sequence[Inputs], rotation: Rotation) -> Implementation:
        """Return an implementation, ready to run its first call."""
        return Here(self.calls(candidate, inputs), rotation)

    @abstractmethod
    def error(self, candidate: str, inputs: Inputs, result: Any) -> float | None:
        """Return the :func:`relative_error` of a result, compared with float64, or None if it cannot be determined.

        The argument `result` is the result of the implementation's first call.
        """

    def __str__(self) -> str:
        return " ".join(map(str, self.labels.values()))


class Implementation(ABC):
    """An implementation of a case, bound to its inputs."""

    @abstractmethod
    def first(self) -> object:
        """Run the first call, which also compiles, and return its result."""

    @abstractmethod
    def seconds(self, count: int) -> float:
        """Return the seconds that this many calls take, one after the other."""

    @abstractmethod
    def peak_bytes(self) -> int:
        """Return the peak bytes that a call allocates, including its results but not its inputs."""

    @abstractmethod
    def launches(self) -> int | None:
        """Return the number of kernels that a call launches on a GPU, or None if it is unknown or on a CPU."""

    def close(self) -> None:  # noqa: B027
        """Release everything that the implementation holds outside this process."""


class Rotation:
    """The sets of inputs of a case, which the calls of all implementations use in turn. It keeps the last results."""

    def __init__(self, sets: int, device: torch.device) -> None:
        self.sets, self.device = sets, device
        self._turns = cycle(range(sets))
        self._kept: dict[int, object] = {}

    def run(self, calls: Sequence[Call], count: int) -> None:
        for _ in repeat(None, count):
            turn = next(self._turns)
            self._kept[turn] = calls[turn]()


class Here(Implementation):
    """An implementation that runs in this process."""

    def __init__(self, calls: Sequence[Call], rotation: Rotation) -> None:
        self._calls, self._rotation = calls, rotation

    def first(self) -> object:
        return self._calls[0]()

    def seconds(self, count: int) -> float:
        return duration(partial(self._rotation.run, self._calls, count), self._rotation.device)

    def peak_bytes(self) -> int:
        return peak_bytes(self._calls[0], self._rotation.device)

    def launches(self) -> int | None:
        return launches(self._calls[0], self._rotation.device)


class Measurement(NamedTuple):
    """Measurements of one implementation on one case."""

    median_us: float
    iqr_us: float
    max_error: float | None
    peak_bytes: int
    launches: int | None


def take(
    cases: Iterable[Case[Any]],
    candidates: Sequence[str],
    device: torch.device,
    blocks: int,
    warn: Callable[[str], object],
) -> Iterator[tuple[float, list[Record]]]:
    """Measure the cases one after the other.

    Args:
        cases: the cases to measure.
        candidates: names of the implementations to measure, where a case has them.
        device: the device to run on.
        blocks: time limit per case, as a multiple of `Case.block_seconds`. Each implementation runs at
            least five blocks.
        warn: called with a message for each implementation that is left out.

    Yields:
        After each case: the bandwidth of a copy during the run so far, in 10^9 bytes per second, and all records.
    """
    copy = Copy(device)
    found: list[tuple[Case[Any], str, Measurement]] = []
    for case in cases:
        copy.sample()
        chosen = [candidate for candidate in case.candidates if candidate in candidates]
        measured = measure(case, chosen, device, blocks, warn)
        found += [(case, candidate, measurement) for candidate, measurement in measured.items()]
        yield copy.bandwidth_gbs, [_record(*each, device, copy.bandwidth_gbs) for each in found]


def _record(
    case: Case[Any], candidate: str, measured: Measurement, device: torch.device, bandwidth_gbs: float
) -> Record:
    is_compared = bandwidth_bound(case, device)
    return {
        **case.labels,
        "candidate": candidate,
        "median_us": measured.median_us,
        "iqr_us": measured.iqr_us,
        "max_error": measured.max_error,
        "bytes": case.bytes,
        "bandwidth_fraction": case.bytes / measured.median_us / (1e3 * bandwidth_gbs) if is_compared else None,
        "peak_bytes": measured.peak_bytes,
        "launches": measured.launches,
    }


def measure(
    case: Case[Any],
    candidates: Iterable[str],
    device: torch.device,
    blocks: int,
    warn: Callable[[str], object],
) -> dict[str, Measurement]:
    """Time the implementations of a case alternately. The arguments are as for :func:`take`."""
    inputs = working_sets(case, device)
    rotation = Rotation(len(inputs), device)
    errors: dict[str, float | None] = {}
    with ExitStack() as closing:
        implementations: dict[str, Implementation] = {}
        for candidate in candidates:
            try:
                implementation = case.implementation(candidate, inputs, rotation)
                closing.callback(implementation.close)
                result = implementation.first()
            except Exception as failure:
                if candidate == case.candidates[0]:
                    raise
                warn(f"{candidate} left out: {_first_line(failure)}")
                continue
            error = case.error(candidate, inputs[0], result)
            if error is not None and not math.isfinite(error):
                raise ArithmeticError(f"{candidate} gives NaN or infinity: {case}")
            del result
            implementations[candidate], errors[candidate] = implementation, error
        times = interleave(implementations, rotation.sets, blocks, case.block_seconds)
        # after the timing, because the first calls may also record or compile
        allocated = {name: (each.peak_bytes(), each.launches()) for name, each in implementations.items()}
    return {
        name: Measurement(*median_and_spread(times[name]), errors[name], *allocated[name]) for name in implementations
    }


def bandwidth_bound(case: Case[Any], device: torch.device) -> bool:
    """Return True if the time of a case is compared with the time of a copy, because its arrays exceed the cache."""
    return not case.arithmetic_bound and case.footprint >= _BANDWIDTH_BOUND_FROM[device.type]


def working_sets(case: Case[Inputs], device: torch.device) -> list[Inputs]:
    """Return so many sets of inputs that each set has been evicted from the cache before it is used again."""
    if not bandwidth_bound(case, device):
        return [case.inputs(device)]
    count = math.ceil(CACHES_FULL * last_level_cache(device) / case.footprint)
    return [case.inputs(device) for _ in range(max(count, 2))]


def interleave(
    implementations: Mapping[str, Implementation], sets: int, blocks: int, block_seconds: float
) -> dict[str, list[float]]:
    """Return the seconds per call in each block of each implementation, whose calls use so many sets of inputs."""
    times: dict[str, list[float]] = {candidate: [] for candidate in implementations}
    with _no_garbage_collection():
        counts = {
            candidate: _calls_in_a_block(implementation, sets, block_seconds)
            for candidate, implementation in implementations.items()
        }
        order = list(implementations)
        end = perf_counter() + blocks * block_seconds
        for round_ in range(_ROUNDS[1]):
            if round_ >= _ROUNDS[0] and perf_counter() > end:
                break
            for candidate in order:
                count = counts[candidate]
                times[candidate].append(implementations[candidate].seconds(count) / count)
            order.reverse()  # so that no implementation always runs after the slowest one
    return times


def _calls_in_a_block(implementation: Implementation, sets: int, block_seconds: float) -> int:
    """Return how many calls fill a block. The trial calls use every set of inputs, and so serve as warm-up."""
    implementation.seconds(sets)
    count = 1
    while (seconds := implementation.seconds(count)) < block_seconds:
        count = math.ceil(count * min(10, 1.2 * block_seconds / seconds))
    return count


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
