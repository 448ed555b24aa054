"""`wakesleep bench`."""

from __future__ import annotations

import os
import shlex
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from wakesleep_ext import checkpoint
from wakesleep_ext.benchmark import report
from wakesleep_ext.benchmark.measure import Copy, Measurement, bandwidth_bound, keep_freed_memory, measure, on_threads
from wakesleep_ext.benchmark.suite import CANDIDATES, OPS, Candidate, Case, suite
from wakesleep_ext.usage import Device, UsageError, find_device

_SECONDS_PER_CASE = 1.5
_QUICK_SECONDS_PER_CASE = 0.5


def bench(
    device: Device = "auto",
    threads: int | None = None,
    op: str = "*",
    quick: bool = False,
    candidates: tuple[Candidate, ...] = CANDIDATES,
    json: Path | None = None,
    plot: Path | None = None,
    compare: Path | None = None,
    show: Path | None = None,
    readme: Path | None = None,
) -> int:
    """Measure the ops beside eager torch, torch.distributions and torch.compile; 1 if one is wrong or has slowed down.

    Args:
        device: Where to compute; auto takes the GPU if there is one.
        threads: CPU threads, the same for all; as many as torch takes by default.
        op: Which ops: a name, or a pattern such as "gaussian_*".
        quick: The largest cases only, in two minutes; all of them take ten.
        candidates: Whom to measure.
        json: Write the figures to this file.
        plot: Draw them to this file, a PNG.
        compare: An earlier result: name the cases that have become slower since.
        show: Measure nothing, take the figures from this file.
        readme: Measure nothing, make the speed tables of this Markdown file anew from the results that they name.
    """
    try:
        if readme:
            text = readme.read_text()
            checkpoint.write_atomically(readme, report.refresh(text, readme.parent).encode())
            return 0
        earlier = report.read(compare) if compare else None
        for path in (json, plot):
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
        result = report.read(show) if show else _measure(device, threads, op, quick, candidates)
        if json:
            report.write(json, result)
        if plot:
            report.plot(plot, result)
        print(report.table(result["records"]))
        print(f"\n{report.caption(result)}")
        slower = report.regressions(earlier, result) if earlier else []
    except report.ResultError as error:
        raise UsageError(str(error)) from error
    if earlier and (where := report.place(earlier)) != report.place(result):
        print(f"wakesleep: {compare} was taken elsewhere: {where}", file=sys.stderr)
    wrong = report.inaccurate(result["records"])
    for line in wrong + slower:
        print(f"wakesleep: {line}", file=sys.stderr)
    return int(bool(wrong or slower))


def _measure(
    device: Device, threads: int | None, op: str, quick: bool, candidates: tuple[Candidate, ...]
) -> report.Result:
    from tqdm import tqdm

    where = find_device(device)
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise UsageError(f"expected --threads of at least 1, got {threads}")
    if not candidates:
        raise UsageError(f"expected --candidates from {', '.join(CANDIDATES)}, got none")
    cases = [case for case in suite(where.type, quick) if fnmatchcase(case.op.name, op)]
    if not cases:
        raise UsageError(f"--op {op} matches none of {', '.join(known.name for known in OPS)}")
    said: set[str] = set()

    def warn(message: str) -> None:
        if message not in said:
            tqdm.write(f"wakesleep: {message}", file=sys.stderr)
        said.add(message)

    keep_freed_memory()
    figures: list[tuple[Case, Candidate, Measurement]] = []
    with on_threads(threads), tqdm(cases, unit="case", desc=f"Measuring on {where}") as bar:
        copy = Copy(where)
        for case in bar:
            bar.set_postfix_str(f"{case.op.name} {list(case.shape)}")
            copy.sample()
            seconds = _QUICK_SECONDS_PER_CASE if quick else _SECONDS_PER_CASE
            measured = measure(case, tuple(dict.fromkeys(candidates)), where, seconds, warn)
            figures += [(case, candidate, measurement) for candidate, measurement in measured.items()]
    bytes_per_us = copy.bandwidth_gbs * 1e3
    return {
        "machine": report.machine(where, threads, _command(where, threads, op, quick, candidates)),
        "copy_bandwidth_gbs": copy.bandwidth_gbs,
        "records": [
            {
                "op": case.op.name,
                "pass": case.pass_name,
                "dtype": case.dtype_name,
                "shape": list(case.shape),
                "candidate": candidate,
                "median_us": found.median_us,
                "iqr_us": found.iqr_us,
                "max_error": found.max_error,
                "bytes": case.bytes,
                "bandwidth_fraction": case.bytes / found.median_us / bytes_per_us
                if bandwidth_bound(case, where)
                else None,
                "peak_bytes": found.peak_bytes,
            }
            for case, candidate, found in figures
        ],
    }


def _command(where: torch.device, threads: int, op: str, quick: bool, candidates: tuple[Candidate, ...]) -> str:
    """The command that takes the same figures again."""
    words = ["wakesleep", "bench", "--device", where.type, "--threads", str(threads)]
    words += ["--op", op] if op != "*" else []
    words += ["--quick"] if quick else []
    words += ["--candidates", *candidates] if candidates != CANDIDATES else []
    capability = os.environ.get("ATEN_CPU_CAPABILITY")
    return (f"ATEN_CPU_CAPABILITY={capability} " if capability else "") + shlex.join(words)
