"""Choose the number of CPU threads for a run.

More threads can be slower. While other processes use the cores, the threads of a step wait for each other. And the
layers of a small network have too little work for many threads. So `auto` measures.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import torch

from wakesleep_ext.training.step import Step
from wakesleep_ext.usage import Threads, on_threads

_WARM_UPS = 3
"""Number of steps before the measurement: one that is called, one that is recorded, and one that is replayed."""
_SECONDS = 0.1
"""Minimum duration of the measurement of a number of threads."""
_GAIN = 0.9
"""More threads are used if they shorten a step to this fraction or less. Near-ties would depend on chance."""


def choose(threads: Threads, trained: Step) -> int:
    """Return the number of threads for a new run. `auto` is the fastest number, up to the number that torch uses.

    To find it, a copy of the machine is trained for 0.1 seconds with 1, 2, 4, … threads, until more threads are not
    faster. The machine and torch's random numbers do not change. Nothing is measured on a GPU, or with several ranks,
    whose number of threads `torchrun` sets.
    """
    most = torch.get_num_threads()
    if threads != "auto":
        return threads
    if most == 1 or trained.images.grey.is_cuda or trained.ranks.count > 1:
        return most
    with torch.random.fork_rng(devices=[]):
        config = replace(trained.config, sleep_warm_up=0, steps_per_replay=1)
        step = Step(deepcopy(trained.machine), trained.images, config)
        index = step.batches()[0]
        with on_threads(1):
            for _ in range(_WARM_UPS):
                step(index)
        return _fastest(lambda count: _seconds_of(lambda: step(index), count), most)


def _seconds_of(step: Callable[[], object], count: int) -> float:
    """Return the mean duration of a step with a number of threads."""
    with on_threads(count):
        steps, start = 0, time.perf_counter()
        while not steps or time.perf_counter() < start + _SECONDS:
            step()
            steps += 1
        return (time.perf_counter() - start) / steps


def _fastest(seconds_of: Callable[[int], float], most: int) -> int:
    """Return the fastest of 1, 2, 4, … and `most` threads. Stops at the first number that gains too little."""
    best, least = 1, seconds_of(1)
    while best < most:
        count = min(2 * best, most)
        if (seconds := seconds_of(count)) > _GAIN * least:
            break
        best, least = count, seconds
    return best
