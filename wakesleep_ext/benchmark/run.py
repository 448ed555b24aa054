"""Run a benchmark: take the figures that a plan asks for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from wakesleep_ext.benchmark import op_suite, result, step_suite
from wakesleep_ext.benchmark.measure import Case, keep_freed_memory, on_threads, take
from wakesleep_ext.benchmark.plan import Plan
from wakesleep_ext.benchmark.suite import Suite
from wakesleep_ext.usage import UsageError, find_device

_SUITES: dict[str, Suite] = {"ops": op_suite.SUITE, "step": step_suite.SUITE}

_BLOCKS_PER_CASE = {"cpu": 100, "cuda": 40}  # a GPU has no one else on it
_QUICK_BLOCKS_PER_CASE = {"cpu": 50, "cuda": 20}


def run(
    plan: Plan,
    progress: Callable[[Sequence[Case[Any]]], Iterable[Case[Any]]] = iter,
    warn: Callable[[str], object] = warnings.warn,
) -> result.Result:
    """Measure.

    Args:
        plan: what.
        progress: wraps the sequence of cases, to show how far it has come.
        warn: gets a line on each candidate that cannot be measured here.

    Raises:
        UsageError: there is no such device, op or candidate.
    """
    device = find_device(plan.device)
    threads = torch.get_num_threads() if plan.threads is None else plan.threads
    if threads < 1:
        raise UsageError(f"expected --threads of at least 1, got {threads}")
    every = _SUITES[plan.suite].cases(device.type, plan.quick)
    cases = [case for case in every if fnmatchcase(case.labels["op"], plan.op)]
    if not cases:
        known = dict.fromkeys(case.labels["op"] for case in every)
        raise UsageError(f"expected --op to match one of {', '.join(known)}, got {plan.op}")
    candidates = tuple(dict.fromkeys(plan.candidates)) or cases[0].candidates
    if unknown := set(candidates) - set(cases[0].candidates):
        raise UsageError(f"expected --candidates of {', '.join(cases[0].candidates)}, got {', '.join(sorted(unknown))}")
    blocks = (_QUICK_BLOCKS_PER_CASE if plan.quick else _BLOCKS_PER_CASE)[device.type]
    machine = result.machine(device, threads, plan.command(device, threads))
    keep_freed_memory()
    with on_threads(threads):
        bandwidth, records = take(progress(cases), candidates, device, blocks, warn)
    return {"suite": plan.suite, "machine": machine, "copy_bandwidth_gbs": bandwidth, "records": records}


def suite_of(figures: result.Result) -> Suite:
    """The suite that a result is of.

    Raises:
        ResultError: there is no such suite.
    """
    name = figures.get("suite", "ops")
    if name not in _SUITES:
        raise result.ResultError(f"expected a result of {' or '.join(_SUITES)}, got one of {name}")
    return _SUITES[name]
