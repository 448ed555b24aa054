"""Name every case of a result in which a baseline is faster."""

from __future__ import annotations

from collections.abc import Sequence

from wakesleep_ext.benchmark.result import Record, Row, ratio, rows
from wakesleep_ext.benchmark.suite import TIMES, Suite, shape


def slower(records: Sequence[Record], suite: Suite) -> list[str]:
    """Return a paragraph and a list that name every case in which a baseline is faster than our implementation.

    The list has a line for each op, pass and baseline. Returns nothing if no baseline was measured.
    """
    groups = comparisons(records, suite)
    if not groups:
        return []
    lines = [
        f"- `{name}` {pass_name}, {baseline}: {_range(faster, baseline)}, {len(faster)} of {len(compared)} cases."
        for (name, pass_name, baseline), compared in groups.items()
        if (faster := [row for row in compared if is_faster(row, baseline)])
    ]
    lost, total = count(records, suite)
    heading = f"A baseline is faster in {lost or 'none'} of {total} comparisons"
    return [f"{heading}:", "\n".join(lines)] if lines else [f"{heading}."]


def count(records: Sequence[Record], suite: Suite) -> tuple[int, int]:
    """Return the number of comparisons in which a baseline is faster, and the number of all comparisons."""
    compared = [(row, baseline) for (_, _, baseline), part in comparisons(records, suite).items() for row in part]
    return sum(is_faster(row, baseline) for row, baseline in compared), len(compared)


def comparisons(records: Sequence[Record], suite: Suite) -> dict[tuple[str, str, str], list[Row]]:
    """Return the cases that compare our implementation with a baseline, by op, pass and baseline."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows(records):
        for baseline in suite.baselines:
            if ratio(row, baseline) is not None:
                groups.setdefault((row["fused"]["op"], row["fused"]["pass"], baseline), []).append(row)
    return groups


def is_faster(row: Row, baseline: str) -> bool:
    """Return True if the baseline's time divided by ours rounds to less than 1.00."""
    found = ratio(row, baseline)
    return found is not None and round(found, 2) < 1


def _range(cases: Sequence[Row], baseline: str) -> str:
    """Return the range of a baseline's times as multiples of ours, and the range of sizes."""
    ratios = sorted(row[baseline]["median_us"] / row["fused"]["median_us"] for row in cases)
    by_size = sorted((row["fused"] for row in cases), key=lambda record: record["bytes"])
    times = [f"{found:.2f}{TIMES}" for found in ratios]
    sizes = [f"{record['dtype']} {shape(record)}" for record in by_size]
    return " at ".join(" to ".join(dict.fromkeys((ends[0], ends[-1]))) for ends in (times, sizes))
