"""Report which goals of a suite are met by a result."""

from __future__ import annotations

from wakesleep_ext.benchmark.report import markdown
from wakesleep_ext.benchmark.result import Result
from wakesleep_ext.benchmark.suite import Suite


def text(result: Result, suite: Suite) -> str:
    """Format a Markdown table of measured and expected values, and count the goals that are met."""
    outcomes = suite.goals(result)
    verdicts = {None: "not measured", True: "met", False: "missed"}
    lines = [(*outcomes[0].cells, ""), *((*one.cells.values(), verdicts[one.met]) for one in outcomes)]
    machine = result["machine"]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    here = machine["gpu"] if machine["device"] == "cuda" else f"{machine['simd']}, {threads}"
    summary = f"{sum(one.met is True for one in outcomes)} of {len(outcomes)} goals are met; they are set for "
    summary += f"{suite.goals_are_for[machine['device']]}, this is {here}."
    return f"{markdown(lines)}\n\n{summary}"
