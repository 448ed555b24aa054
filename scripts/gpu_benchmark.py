"""Measure a suite of the benchmark on a GPU in limited time, or compile its baselines beforehand.

Compilation takes longer than everything else. It can run in many processes at once, while the GPU is not needed for
timings: `--compile 3/8` compiles the third eighth of the cases, into the cache of torch's compiler.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from wakesleep_ext.benchmark import report, result
from wakesleep_ext.benchmark.measure import Case
from wakesleep_ext.benchmark.plan import Plan
from wakesleep_ext.benchmark.result import Record
from wakesleep_ext.benchmark.run import SUITES, run
from wakesleep_ext.info import commit_of

ROOT = Path(__file__).resolve().parent.parent

TUNED = "max-autotune"
"""A baseline that takes minutes to compile, and needs the GPU for itself meanwhile. So it is left out."""
COMPILED = ("compile", "compiled step")
"""The baselines that are compiled. The other compiled ones compile the same code, or tune it on a GPU at rest."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--op", default="*")
    parser.add_argument("--compile", metavar="PART/PARTS")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after this time")
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args()
    every = SUITES[chosen.suite].cases(chosen.device, chosen.quick)
    cases = [case for case in every if fnmatchcase(case.labels["op"], chosen.op)]
    if chosen.compile:
        part, parts = map(int, chosen.compile.split("/"))
        compile_all(in_turns(cases)[part - 1 :: parts], torch.device(chosen.device))
    else:
        candidates = tuple(dict.fromkeys(name for case in cases for name in case.candidates if name != TUNED))
        plan = Plan(chosen.suite, chosen.op, chosen.device, quick=chosen.quick, candidates=candidates)
        measure(plan, chosen.seconds, chosen.json)


def measure(plan: Plan, seconds: float, path: Path) -> None:
    """Measure as many cases as fit in the time, those that differ most first. Write the result after each case."""
    end = time.monotonic() + seconds
    places: dict[str, int] = {}

    def differing_first(cases: Sequence[Case[Any]]) -> list[Case[Any]]:
        places.update({str(case): place for place, case in enumerate(cases)})
        return in_turns(cases)

    def place(record: Record) -> int:
        return places[" ".join(str(record[name]) for name in ("op", "pass", "dtype", "shape"))]

    commit, modified = commit_of(ROOT)  # built from here
    for figures in run(plan, differing_first):
        figures["records"] = sorted(figures["records"], key=place)
        figures["machine"]["commit"], figures["machine"]["modified"] = commit, modified
        result.write(path, figures)
        if time.monotonic() > end:
            break
    print(report.text(figures, SUITES[plan.suite]))
    print(f"{len(set(map(place, figures['records'])))} of {len(places)} cases in {seconds:.0f} seconds")


def in_turns(cases: Sequence[Case[Any]]) -> list[Case[Any]]:
    """Return one case of each op, then another one of each, and so on."""
    of_ops: dict[str, list[Case[Any]]] = {}
    for case in cases:
        of_ops.setdefault(case.labels["op"], []).append(case)
    return [case for turn in zip_longest(*of_ops.values()) for case in turn if case is not None]


def compile_all(cases: Sequence[Case[Any]], device: torch.device) -> None:
    """Compile the baselines of these cases."""
    # other processes use the GPU, so the measuring process tunes the kernels itself
    torch._inductor.config.autotune_local_cache = False
    for case in cases:
        for name in set(COMPILED).intersection(case.candidates):
            try:
                case.calls(name, [case.inputs(device)])[0]()
            except Exception as failure:
                warnings.warn(f"{case}: {failure}", stacklevel=1)  # the measuring process meets and reports it


if __name__ == "__main__":
    sys.exit(main())
