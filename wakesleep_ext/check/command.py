"""The command `wakesleep check`. It imports torch only when it runs, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING

from wakesleep_ext.usage import PICTURES, check_output

if TYPE_CHECKING:
    from wakesleep_ext.check.problems import Answer


def check(quick: bool = False, json: bool = False, plot: Path | None = None) -> int:
    """Train and evaluate problems with known answers, using the real ops and objectives. The exit status is 1 if an
    answer is wrong.

    Args:
        quick: Train for a quarter of the steps, with the same tolerances. This takes half a minute.
        json: Print one JSON object instead of a table.
        plot: Plot the histograms of simulation-based calibration to this file: .png, .pdf or .svg.
    """
    from wakesleep_ext.check import calibration, problems
    from wakesleep_ext.report import plots

    if plot:
        check_output(plot, "--plot", *PICTURES)
    form, answers = problems.Check(quick=quick, ranks={}), []
    if not json:
        print(_ROW.format("problem", "quantity", "expected", "got", "tolerance", ""))
    for problem in problems.PROBLEMS:
        for answer in problem(form):
            answers.append(answer)
            if not json:
                print(_line(answer), flush=True)
    failed = sum(not answer.passed for answer in answers)
    if json:
        print(dumps({"failed": failed, "answers": [asdict(answer) | {"passed": answer.passed} for answer in answers]}))
    else:
        print(f"\n{failed or 'none'} of {len(answers)} wrong")
    if plot:
        plots.rank_histograms(plot, form.ranks, calibration.NUM_SAMPLES + 1)
    return int(failed > 0)


_ROW = "{:28}  {:45}  {:>10}  {:>10}  {:14}  {}"


def _line(answer: Answer) -> str:
    verdict = "pass" if answer.passed else "FAIL"
    expected, got = f"{answer.expected:.6f}", f"{answer.got:.6f}"
    return _ROW.format(answer.problem, answer.quantity, expected, got, _tolerance(answer), verdict).rstrip()


def _tolerance(answer: Answer) -> str:
    if answer.below == answer.above:
        return f"± {answer.above:g}"
    return f"{answer.expected - answer.below:.3g} to {answer.expected + answer.above:.3g}"
