"""`wakesleep bench`."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from wakesleep_ext.benchmark import goals as wanted
from wakesleep_ext.benchmark import op_suite, report, result, step_suite
from wakesleep_ext.benchmark.measure import Case, keep_freed_memory, on_threads, take
from wakesleep_ext.benchmark.suite import Suite
from wakesleep_ext.usage import Device, UsageError, find_device

_SUITES: dict[str, Suite] = {"ops": op_suite.SUITE, "step": step_suite.SUITE}

_BLOCKS_PER_CASE = {"cpu": 100, "cuda": 40}  # a GPU has no one else on it
_QUICK_BLOCKS_PER_CASE = {"cpu": 50, "cuda": 20}


@dataclass(frozen=True)
class Plan:
    """What to measure, where, and beside whom."""

    suite: Literal["ops", "step"] = "ops"
    """What to measure: the ops, or whole training steps."""
    op: str = "*"
    """Which of it: the name of an op or a net, or a pattern such as "gaussian_*"."""
    device: Device = "auto"
    """Where to compute; auto takes the GPU if there is one."""
    threads: int | None = None
    """CPU threads, the same for all; as many as torch takes by default."""
    quick: bool = False
    """A few cases only, in a minute or so; all of them take six or more."""
    candidates: tuple[str, ...] = ()
    """Whom to measure, of fused, eager, distributions, compile, and for a step products; all by default."""

    def command(self, device: torch.device, threads: int) -> str:
        """What takes the same figures again on the same machine."""
        words = ["wakesleep", "bench", "--device", device.type, "--threads", str(threads)]
        words += ["--suite", self.suite] if self.suite != "ops" else []
        words += ["--op", self.op] if self.op != "*" else []
        words += ["--quick"] if self.quick else []
        words += ["--candidates", *self.candidates] if self.candidates else []
        capability = os.environ.get("ATEN_CPU_CAPABILITY")
        return (f"ATEN_CPU_CAPABILITY={capability} " if capability else "") + shlex.join(words)


def bench(
    plan: Plan,
    json: Path | None = None,
    plot: Path | None = None,
    compare: Path | None = None,
    goals: bool = False,
    show: Path | None = None,
) -> int:
    """Measure ops or a training step beside eager torch, torch.distributions and torch.compile; 1 if one is wrong or
    has slowed down.

    Args:
        plan: What to measure.
        json: Write the figures to this file.
        plot: Draw them to this file, a PNG.
        compare: An earlier result: name the cases that have become slower since.
        goals: Hold the figures to the goals that are set for the device.
        show: Measure nothing, take the figures from this file.
    """
    if plot and plot.suffix != ".png":
        raise UsageError(f"expected --plot to name a .png file, got {plot}")
    try:
        earlier = result.read(compare) if compare else None
        for path in filter(None, (json, plot)):  # now, rather than when all is measured
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir() or not os.access(path.parent, os.W_OK):
                raise UsageError(f"expected --json and --plot to name files that can be written, got {path}")
        figures = result.read(show) if show else _watched(plan)
        if json:
            result.write(json, figures)
        suite = suite_of(figures)
        print(report.text(figures, suite))
        if goals:
            print(f"\n{wanted.text(figures, suite)}")
        if plot:
            report.plot(plot, figures, suite)
        slower = result.regressions(earlier, figures) if earlier else []
    except result.ResultError as error:
        raise UsageError(str(error)) from error
    if earlier and (where := result.place(earlier)) != result.place(figures):
        _say(f"{compare} was taken elsewhere: {where}")
    wrong = result.inaccurate(figures["records"])
    for line in wrong + slower:
        _say(line)
    return int(bool(wrong or slower))


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


def _watched(plan: Plan) -> result.Result:
    """Measure beneath a progress bar."""
    from tqdm import tqdm

    def bar(cases: Sequence[Case[Any]]) -> Iterator[Case[Any]]:
        with tqdm(cases, unit="case", desc="Measuring") as bar:
            for case in bar:
                bar.set_postfix_str(str(case))
                yield case

    return run(plan, bar, cache(lambda message: tqdm.write(f"wakesleep: {message}", file=sys.stderr)))


def _say(message: str) -> None:
    print(f"wakesleep: {message}", file=sys.stderr)
