"""The goals that are set for the ops on one thread of a CPU, and which of them a result meets."""

from __future__ import annotations

from typing import NamedTuple

from wakesleep_ext.benchmark.op_suite import headline
from wakesleep_ext.benchmark.report import markdown
from wakesleep_ext.benchmark.result import Result, Row, ratio, rows, title


class Goal(NamedTuple):
    """An op in float32, its working set beyond the cache, compared with the fastest of some others, or with a copy."""

    op: str
    pass_name: str
    others: tuple[str, ...]
    at_least: float
    """Times as fast as the others; or of copy speed, where there are none."""
    with_avx2: float | None = None
    """The same without AVX-512, where it differs."""


_EAGER = ("eager", "distributions")
_BACKWARD = "forward+backward"

GOALS = (
    Goal("bernoulli_log_prob", "forward", _EAGER, 5, with_avx2=3),
    Goal("bernoulli_log_prob", "forward", ("compile",), 4),
    Goal("bernoulli_log_prob", "forward", (), 0.6),
    Goal("bernoulli_log_prob", _BACKWARD, _EAGER, 4),
    Goal("bernoulli_log_prob", _BACKWARD, ("compile",), 3.5),
    Goal("bernoulli_log_prob", _BACKWARD, (), 0.5),
    Goal("gaussian_rsample_log_prob", "forward", _EAGER, 20, with_avx2=8),
    Goal("gaussian_rsample_log_prob", "forward", ("compile",), 15),
    Goal("gaussian_log_prob", "forward", ("distributions",), 15),
    Goal("gaussian_log_prob", "forward", ("compile",), 1),
    Goal("gaussian_log_prob", "forward", (), 0.7),
    Goal("bernoulli_sample", "forward", ("eager",), 15, with_avx2=8),
    Goal("bernoulli_sample", "forward", ("compile",), 10),
)


def text(result: Result) -> str:
    """The goals as a Markdown table: what was measured, what was wanted; and each case that is slower than eager."""
    large: dict[tuple[str, str], Row] = {}
    for row in sorted(rows(headline(result["records"])), key=lambda row: next(iter(row.values()))["bytes"]):
        if (fused := row.get("fused")) and fused["bandwidth_fraction"] is not None:
            large[fused["op"], fused["pass"]] = row  # the largest is the last
    simd, threads = result["machine"]["simd"], result["machine"]["threads"]
    lines = [("op", "pass", "beside", "measured", "goal", "")]
    verdicts = []
    for goal in GOALS:
        wanted = goal.with_avx2 if goal.with_avx2 and simd == "AVX2" else goal.at_least
        case = large.get((goal.op, goal.pass_name))
        measured = _measured(goal, case) if case else None
        verdict = "not measured" if measured is None else "met" if measured >= wanted else "missed"
        unit = "\N{MULTIPLICATION SIGN}" if goal.others else " of copy speed"
        shown = "\N{EN DASH}" if measured is None else f"{measured:.{1 if goal.others else 2}f}{unit}"
        beside = " and ".join(goal.others) or "a copy"
        lines.append((f"`{goal.op}`", goal.pass_name, beside, shown, f"≥ {wanted:g}{unit}", verdict))
        verdicts.append(verdict)
    summary = f"{verdicts.count('met')} of {len(GOALS)} goals are met; they are set for 1 thread of a CPU with AVX-512"
    summary += f" or AVX2, this is {simd}, {threads} thread{'s' * (threads != 1)}."
    compared = [(row, found) for row in rows(result["records"]) if (found := ratio(row, "eager")) is not None]
    slower = [f"{1 / found:.2f} times as long: {title(row['fused'])}" for row, found in compared if found < 1]
    summary += f" {len(slower)} of {len(compared)} cases are slower than eager{':' if slower else '.'}"
    return "\n".join([markdown(lines), "", summary, *slower])


def _measured(goal: Goal, row: Row) -> float | None:
    if not goal.others:
        return row["fused"]["bandwidth_fraction"]
    found = [ratio(row, other) for other in goal.others]
    return None if None in found else min(value for value in found if value is not None)
