"""How a figure is taken: candidates interleaved in one process, median and spread, the error beside each time.

A block is as many calls in a row as fill two milliseconds. The candidates take turns, block by block, so that whatever
else the machine does falls on all alike. Every call of a large case meets arrays that have left the last-level cache:
several sets of inputs are used in turn, and results are kept until their set comes round again, so that the memory
they are written to is cold as well. Small cases run on one set, warm, as in practice; what they take is overhead.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, repeat
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from wakesleep_ext import reference
from wakesleep_ext.benchmark.suite import Candidate, Case, Inputs, function

Call = Callable[[], object]

_BLOCK_SECONDS = 2e-3
_ROUNDS = (5, 200)  # at least, at most
_CACHES_FULL = 2  # working sets come to so many last-level caches
_BANDWIDTH_BOUND_FROM = {"cpu": 2**20, "cuda": 2**25}
"""Bytes whose transfer outweighs the cost of a call: tens of microseconds, where a call takes a few."""


@dataclass(frozen=True)
class Measurement:
    """What a candidate made of a case."""

    median_us: float
    iqr_us: float
    max_error: float | None
    peak_bytes: int


def measure(
    case: Case,
    candidates: Sequence[Candidate],
    device: torch.device,
    seconds: float,
    warn: Callable[[str], object],
) -> dict[Candidate, Measurement]:
    """Run the candidates side by side.

    Args:
        case: what to run.
        candidates: who runs; torch.compile is left out if it fails.
        device: where.
        seconds: how long to repeat, all candidates together; each has five blocks at least.
        warn: gets a line on each candidate that is left out.
    """
    inputs = _sets(case, device)
    with torch.set_grad_enabled(case.backward):
        calls: dict[Candidate, list[Call]] = {}
        errors: dict[Candidate, float | None] = {}
        peaks: dict[Candidate, int] = {}
        for candidate in candidates:
            try:
                run = partial(_run, function(case, candidate)) if case.backward else function(case, candidate)
                one, *others = [partial(run, i) if case.backward else partial(run, *i.arguments) for i in inputs]
                result = one()
            except Exception as failure:
                if candidate != "compile":
                    raise
                warn(f"torch.compile left out: {_first_line(failure)}")
                continue
            errors[candidate] = error = max_error(case, inputs[0], result)
            if error is not None and not math.isfinite(error):
                raise ArithmeticError(f"{candidate} gives NaN or infinity: {case}")
            del result
            peaks[candidate] = peak_bytes(one, device)
            calls[candidate] = [one, *others]
        times = interleave(calls, device, seconds)
    return {
        candidate: Measurement(*median_and_spread(times[candidate]), errors[candidate], peaks[candidate])
        for candidate in calls
    }


def bandwidth_bound(case: Case, device: torch.device) -> bool:
    """Whether a case is measured beyond the cache, and its time compared with that of a copy."""
    return case.bytes >= _BANDWIDTH_BOUND_FROM[device.type]


def interleave(
    calls: Mapping[Candidate, Sequence[Call]], device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """Seconds per call of each candidate, block by block; the calls of a candidate are taken in turn."""
    turns = cycle(range(max(map(len, calls.values()), default=1)))
    kept: dict[int, object] = {}

    def block(candidate: Candidate, count: int) -> float:
        own = calls[candidate]
        _synchronize(device)
        start = perf_counter()
        for _ in repeat(None, count):
            turn = next(turns)
            kept[turn] = own[turn]()
        _synchronize(device)
        return (perf_counter() - start) / count

    times: dict[str, list[float]] = {candidate: [] for candidate in calls}
    with _no_garbage_collection():
        counts = {candidate: _calls_in_a_block(partial(block, candidate), len(own)) for candidate, own in calls.items()}
        order = list(calls)
        end = perf_counter() + seconds
        for round_ in range(_ROUNDS[1]):
            if round_ >= _ROUNDS[0] and perf_counter() > end:
                break
            for candidate in order:
                times[candidate].append(block(candidate, counts[candidate]))
            order.reverse()  # nobody is always the one who follows the slowest
    return times


def median_and_spread(seconds: Sequence[float]) -> tuple[float, float]:
    """Median and interquartile range, in microseconds."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return 1e6 * median, 1e6 * (high - low)


def max_error(case: Case, inputs: Inputs, result: Any) -> float | None:
    """Largest deviation of a call's log-densities and gradients from float64, relative to the largest (or to 1).

    Draws are random, but the rest follows from them: log-density and gradients are held to those of the z that was
    drawn. None where there is nothing else, or where z is rounded to a half type and says too little.
    """
    if case.op.draws and (torch.finfo(case.dtype).bits < 32 or not (case.backward or "log_prob" in case.op.outputs)):
        return None
    results, gradients = result if case.backward else (_tuple(result), ())
    found = [*results, *gradients]
    exact = _exact(case, inputs, results)
    if case.op.draws:
        found, exact = found[1:], exact[1:]
    return max(
        ((a.double() - b).abs().max() / b.abs().max().clamp_min(1)).item() for a, b in zip(found, exact, strict=True)
    )


def peak_bytes(call: Call, device: torch.device) -> int:
    """Most bytes that a call has allocated at once, its results included and its inputs not."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler announces itself on stderr otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_bytes())["traceEvents"] if event["name"] == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak


class Copy:
    """A copy larger than the cache, timed again and again in the course of a run."""

    def __init__(self, device: torch.device) -> None:
        size = max(_CACHES_FULL * last_level_cache(device), {"cpu": 2**26, "cuda": 2**28}[device.type])
        self.source = torch.ones(size, dtype=torch.uint8, device=device)
        self.target = self.source.clone()
        self.seconds: list[float] = []

    def sample(self, count: int = 5) -> None:
        for _ in repeat(None, count):
            _synchronize(self.source.device)
            start = perf_counter()
            self.target.copy_(self.source)
            _synchronize(self.source.device)
            self.seconds.append(perf_counter() - start)

    @property
    def bandwidth_gbs(self) -> float:
        """Bytes read plus bytes written in a second, median, in 10^9."""
        return 2 * self.source.nbytes / statistics.median(self.seconds) / 1e9


def last_level_cache(device: torch.device) -> int:
    """Size in bytes; 32 MiB where a CPU does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [
        int(file.read_text().strip().removesuffix("K")) * 1024
        for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=32 * 2**20)


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for this process, as torch does on a GPU.

    Otherwise large results come fresh from the kernel at some calls and not at others: page faults make a call take up
    to three times as long, and whoever allocates most suffers most. Without effect where the library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Everything on so many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _sets(case: Case, device: torch.device) -> list[Inputs]:
    """Inputs, as often as it takes to have them out of the cache when it is their turn again."""
    one = case.inputs(device)
    if not bandwidth_bound(case, device):
        return [one]
    count = math.ceil(_CACHES_FULL * last_level_cache(device) / case.footprint)
    return [one, *(case.inputs(device) for _ in range(max(count, 2) - 1))]


def _run(plain: Callable[..., Any], inputs: Inputs) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Forward and backward: results, and gradients of the parameters."""
    results = _tuple(plain(*inputs.arguments))
    return results, torch.autograd.grad(results, inputs.parameters, inputs.upstream)


def _exact(case: Case, inputs: Inputs, results: tuple[Tensor, ...]) -> list[Tensor]:
    """Results and gradients in float64; of a draw, with the noise that the drawn z must have come from."""
    parameters = {id(tensor) for tensor in inputs.parameters}
    wide = [t.detach().double().requires_grad_(id(t) in parameters) for t in inputs.arguments]
    if case.op.draws:
        mu, logvar = wide
        sigma = (0.5 * logvar).exp()
        eps = ((results[0].detach().double() - mu) / sigma).detach()
        log_prob = -0.5 * (logvar + eps.square() + math.log(2 * math.pi)).sum(-1)
        outputs: tuple[Tensor, ...] = (mu + sigma * eps, log_prob)[: len(results)]
    else:
        outputs = _tuple(getattr(reference, case.op.name)(*wide))
    if not case.backward:
        return list(outputs)
    differentiated = [tensor for tensor in wide if tensor.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, differentiated, [u.double() for u in inputs.upstream])]


def _calls_in_a_block(block: Callable[[int], float], sets: int) -> int:
    """As many as fill a block; finding out is the warm-up, which begins with each set of inputs once."""
    block(sets)
    count = 1
    while (seconds := count * block(count)) < _BLOCK_SECONDS:
        count = math.ceil(count * min(10, 1.2 * _BLOCK_SECONDS / seconds))
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


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
