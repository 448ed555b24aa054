"""The command `wakesleep bench`. It imports torch only when it runs, so that `--help` is fast."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wakesleep_ext.benchmark.plan import Plan
from wakesleep_ext.usage import UsageError, check_output

if TYPE_CHECKING:
    from wakesleep_ext.benchmark.measure import Case
    from wakesleep_ext.benchmark.result import Result


def bench(
    plan: Plan,
    json: Path | None = None,
    plot: Path | None = None,
    compare: Path | None = None,
    goals: bool = False,
    show: Path | None = None,
) -> int:
    """Time ops or training steps, compared with eager torch, torch.distributions and torch.compile. The exit status
    is 1 if a result is wrong or has become slower.

    Args:
        plan: The cases and implementations to measure, and the device.
        json: Write the results to this file.
        plot: Plot the results to this PNG file.
        compare: File of earlier results; report the cases that have become slower since then.
        goals: Compare the results with the goals for the device.
        show: Show the results in this file instead of measuring.
    """
    from wakesleep_ext.benchmark import goals as wanted
    from wakesleep_ext.benchmark import report, result
    from wakesleep_ext.benchmark.run import suite_of

    for path, option, suffixes in ((json, "--json", ()), (plot, "--plot", (".png",))):
        if path:
            check_output(path, option, *suffixes)
            path.parent.mkdir(parents=True, exist_ok=True)
    try:
        earlier = result.read(compare) if compare else None
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
        _say(f"{compare} was measured elsewhere: {where}")
    wrong = result.inaccurate(figures["records"])
    for line in wrong + slower:
        _say(line)
    return int(bool(wrong or slower))


def _watched(plan: Plan) -> Result:
    """Measure, with a progress bar."""
    from tqdm import tqdm

    from wakesleep_ext.benchmark.run import run

    def bar(cases: Sequence[Case[Any]]) -> Iterator[Case[Any]]:
        with tqdm(cases, unit="case", desc="Measuring") as bar:
            for case in bar:
                bar.set_postfix_str(str(case))
                yield case

    for figures in run(plan, bar, cache(lambda message: tqdm.write(f"wakesleep: {message}", file=sys.stderr))):
        last = figures  # the results of earlier cases are part of it
    return last


def _say(message: str) -> None:
    print(f"wakesleep: {message}", file=sys.stderr)
