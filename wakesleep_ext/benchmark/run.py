"""Run the benchmark that a plan describes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from wakesleep_ext.benchmark import op_suite, result, step_suite
from wakesleep_ext.benchmark.instruments import keep_freed_memory
from wakesleep_ext.benchmark.measure import Case, take
from wakesleep_ext.benchmark.plan import Plan
from wakesleep_ext.benchmark.suite import Suite
from wakesleep_ext.usage import UsageError, find_device, on_threads

SUITES: dict[str, Suite] = {"ops": op_suite.SUITE, "step": step_suite.SUITE}

_BLOCKS_PER_CASE = {"cpu": 100, "cuda": 40}  # other processes disturb CPU timings more than GPU timings
_QUICK_BLOCKS_PER_CASE = {"cpu": 50, "cuda": 20}


def run(
    plan: Plan,
    progress: Callable[[Sequence[Case[Any]]], Iterable[Case[Any]]] = iter,
    warn: Callable[[str], object] = warnings.warn,
) -> Iterator[result.Result]:
    """Run a benchmark.

    Args:
        plan: the cases and implementations to measure, and the device.
        progress: wraps the sequence of cases, to show progress.
        warn: called with a message for each implementation that cannot be measured here.

    Yields:
        The result so far, after each case.

    Raises:
        UsageError: the plan names a device, op or implementation that does not exist.
    """
    device = find_device(plan.device)
    threads = torch.get_num_threads() if plan.threads is None else plan.threads
    every = SUITES[plan.suite].cases(device.type, plan.quick)
    cases = [case for case in every if fnmatchcase(case.labels["op"], plan.op)]
    if not cases:
        ops = dict.fromkeys(case.labels["op"] for case in every)
        raise UsageError(f"expected --op to match one of {', '.join(ops)}, got {plan.op}")
    known = dict.fromkeys(candidate for case in cases for candidate in case.candidates)
    if unknown := set(plan.candidates) - set(known):
        raise UsageError(f"expected --candidates to be among {', '.join(known)}, got {', '.join(sorted(unknown))}")
    candidates = plan.candidates or tuple(known)
    cases = [case for case in cases if not set(candidates).isdisjoint(case.candidates)]
    blocks = (_QUICK_BLOCKS_PER_CASE if plan.quick else _BLOCKS_PER_CASE)[device.type]
    machine = result.machine(device, threads, plan.command(device, threads))
    keep_freed_memory()
    with on_threads(threads):
        for bandwidth, records in take(progress(cases), candidates, device, blocks, warn):
            yield {"suite": plan.suite, "machine": machine, "copy_bandwidth_gbs": bandwidth, "records": records}


def suite_of(figures: result.Result) -> Suite:
    """Return the suite that a result belongs to.

    Raises:
        ResultError: the suite does not exist.
    """
    name = figures.get("suite", "ops")
    if name not in SUITES:
        raise result.ResultError(f"expected the suite of the result to be {' or '.join(SUITES)}, got {name}")
    return SUITES[name]
