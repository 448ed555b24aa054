"""Measure a call: its time, error, memory, kernel launches, and the bandwidth of a copy."""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]

CACHES_FULL = 2
"""Size of data that cycle through the last-level cache, as a multiple of its size."""


def duration(run: Call, device: torch.device) -> float:
    """Return the seconds that a call takes. On a GPU, CUDA events measure the time."""
    if device.type != "cuda":
        begin = perf_counter()
        run()
        return perf_counter() - begin
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def median_and_spread(seconds: Sequence[float]) -> tuple[float, float]:
    """Return the median and interquartile range, in microseconds."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return 1e6 * median, 1e6 * (high - low)


def relative_error(found: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """Return the largest error relative to each float64 tensor's largest value, or to 1 if that is larger."""
    return max(
        ((a.double() - b).abs().max() / b.abs().max().clamp_min(1)).item() for a, b in zip(found, exact, strict=True)
    )


def peak_bytes(call: Call, device: torch.device) -> int:
    """Return the peak bytes that a call allocates, including its results but not its inputs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    allocated = peak = 0
    events = [event for event in trace(call, ProfilerActivity.CPU) if event["name"] == "[memory]"]
    for event in sorted(events, key=lambda event: event["ts"]):
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak


def launches(call: Call, device: torch.device) -> int | None:
    """Return the number of kernels that a call launches on a GPU, including kernels in CUDA graphs.

    Return None on a CPU, or if the profiler records no kernels.
    """
    if device.type != "cuda":
        return None

    def to_the_end() -> None:
        call()
        torch.cuda.synchronize(device)

    return sum(event.get("cat") == "kernel" for event in trace(to_the_end, ProfilerActivity.CUDA)) or None


def trace(call: Call, activity: ProfilerActivity) -> list[dict[str, Any]]:
    """Run torch's profiler on a call, and return events in Chrome's trace format."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # keeps the profiler from printing to stderr
    with profile(activities=[activity], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events: list[dict[str, Any]] = json.loads(file.read_bytes())["traceEvents"]
    return events


class Copy:
    """Copies an array larger than the cache, and times the copy repeatedly during a run."""

    def __init__(self, device: torch.device) -> None:
        size = max(CACHES_FULL * last_level_cache(device), {"cpu": 2**26, "cuda": 2**28}[device.type])
        self.source = torch.ones(size, dtype=torch.uint8, device=device)
        self.target = self.source.clone()
        self.seconds: list[float] = []

    def sample(self, count: int = 5) -> None:
        for _ in repeat(None, count):
            self.seconds.append(duration(partial(self.target.copy_, self.source), self.source.device))

    @property
    def bandwidth_gbs(self) -> float:
        """Median bandwidth, in 10^9 bytes per second. Bytes read and bytes written are both counted."""
        return 2 * self.source.nbytes / statistics.median(self.seconds) / 1e9


def last_level_cache(device: torch.device) -> int:
    """Return the size of the last-level cache in bytes, or 32 MiB if a CPU does not report it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [
        int(file.read_text().strip().removesuffix("K")) * 1024
        for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=32 * 2**20)


def keep_freed_memory() -> None:
    """Make the C library keep freed memory for this process, as torch's caching allocator does on a GPU.

    Otherwise some calls would get fresh pages for large results, and others would not. With page faults, a call takes
    up to three times as long as without, which penalises the implementations that allocate most. This function has no
    effect if the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)
