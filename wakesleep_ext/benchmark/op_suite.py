"""Report results of ops: sections, headline and goals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from wakesleep_ext.benchmark.op_sizes import MEASURED, cases
from wakesleep_ext.benchmark.result import Record, Result, Row, any_record, ratio, rows, title
from wakesleep_ext.benchmark.suite import NONE, TIMES, Outcome, Section, Suite, shape

_TYPICAL_EVENTS = (100, 128)


def _multiplies(record: Record) -> bool:
    return record["op"] in MEASURED and MEASURED[record["op"]].multiplies


def _events(record: Record) -> int:
    """Return the number of events, that is of rows."""
    measured = MEASURED.get(record["op"])
    return measured.num_events(record["shape"]) if measured else record["shape"][0]


def sections(records: Iterable[Record]) -> list[Section]:
    """Return the cases larger than the cache, those that fit in it, those that multiply matrices, and optimizers."""
    parts: dict[str, list[Row]] = {
        "Beyond the cache:": [],
        "Within the cache, where overhead counts:": [],
        "Layers and heads, where arithmetic counts:": [],
        "Optimizers:": [],
    }
    beyond, within, layers, optimizers = parts.values()
    for row in rows(records):
        record = any_record(row)
        if _multiplies(record):
            layers.append(row)
        elif record["op"] == "adam_":
            optimizers.append(row)
        else:
            (within if record["bandwidth_fraction"] is None else beyond).append(row)
    return [(heading, part) for heading, part in parts.items() if part]


def headline(records: Iterable[Record]) -> list[Record]:
    """Return the float32 records of the common width with about 100 events, and with the largest measured number."""
    plain = [
        record
        for record in records
        if record["op"] in MEASURED
        and record["dtype"] in ("float32", "uint8")
        and tuple(record["shape"][1:]) == MEASURED[record["op"]].widths[0]
    ]
    most = {r["op"]: max(other["shape"][0] for other in plain if other["op"] == r["op"]) for r in plain}
    return [r for r in plain if r["shape"][0] in (*_TYPICAL_EVENTS, most[r["op"]])]


# ---- goals -----------------------------------------------------------------------------------------------------------


class Goal(NamedTuple):
    """A minimum that every case must reach."""

    what: str
    applies: Callable[[Record], bool]
    """Selects the cases by our record."""
    measured: Callable[[Row], float | None]
    """Returns what is compared with `at_least`; None if it was not measured."""
    at_least: float
    unit: str = TIMES


def _every(record: Record) -> bool:
    return True


def _is_layer(record: Record) -> bool:
    return _multiplies(record) and MEASURED[record["op"]].op.name in ("linear", "mlp")


def _versus(
    baseline: str, applies: Callable[[Record], bool] = _every, of: str = "ops", at_least: float = 1, at: str = ""
) -> Goal:
    return Goal(f"{of} versus {baseline}{at}", applies, lambda row: ratio(row, baseline), at_least)


def _of_copy(what: str, samplers: bool, at_least: float, pass_name: str = "") -> Goal:
    """Return a goal for float32 arrays beyond the cache, whose rows are multiples of 64 bytes."""

    def applies(record: Record) -> bool:
        measured = MEASURED.get(record["op"])
        is_density = measured is not None and not measured.op.draws and not measured.op.name.endswith("_")
        is_sampler = measured is not None and measured.op.draws
        aligned = record["dtype"] == "float32" and record["shape"][-1] % 16 == 0
        return aligned and (is_sampler if samplers else is_density) and record["pass"].endswith(pass_name)

    return Goal(what, applies, lambda row: row["fused"]["bandwidth_fraction"], at_least, " of copy speed")


_ANYWHERE = (
    _versus("eager", lambda record: not _is_layer(record)),
    _versus("eager", _is_layer, "layers", 0.98),
    _versus("distributions"),
    _versus("torch fused"),
)
GOALS = {
    "cpu": (
        *_ANYWHERE,
        _versus("compile", lambda record: _events(record) >= 100, at=", 100 rows or more"),
        _of_copy("densities, forward", False, 0.6, "forward"),
        _of_copy("densities, forward+backward", False, 0.5, "backward"),
    ),
    "cuda": (
        *_ANYWHERE,
        _versus("compile"),
        _of_copy("densities", False, 0.9),
        _of_copy("samplers", True, 0.8),
    ),
}
"""The goals by device type."""


def outcomes(result: Result) -> list[Outcome]:
    """Check each goal for the device on every case that it applies to, and name the case that is furthest behind."""
    ours = [row for row in rows(result["records"]) if "fused" in row]
    return [_outcome(goal, ours) for goal in GOALS[result["machine"]["device"]]]


def _outcome(goal: Goal, ours: Sequence[Row]) -> Outcome:
    rated = [(goal.measured(row), row) for row in ours if goal.applies(row["fused"])]
    found = [(measured, row) for measured, row in rated if measured is not None]
    least, worst = min(found, key=lambda pair: pair[0], default=(None, None))
    reached = sum(measured >= goal.at_least for measured, _ in found)
    cells = {
        "what": goal.what,
        "goal": f"≥ {goal.at_least:g}{goal.unit}",
        "least": NONE if least is None else f"{least:.2f}{goal.unit}",
        "where": NONE if worst is None else title(worst["fused"]),
        "reached": f"{reached} of {len(found)}",
    }
    return Outcome(cells, reached == len(found) if found else None)


# ---- the suite -------------------------------------------------------------------------------------------------------


def _label(record: Record) -> str:
    backward = " + backward" if record["pass"] == "forward+backward" else ""
    return f"{record['op']}{backward}\n{shape(record)}"


SUITE = Suite(
    noun="op",
    cases=cases,
    baselines=tuple(dict.fromkeys(name for measured in MEASURED.values() for name in measured.baselines)),
    sections=sections,
    headline=headline,
    columns={
        "op": lambda record: f"`{record['op']}`",
        "pass": lambda record: record["pass"],
        "dtype": lambda record: record["dtype"],
        "shape": shape,
    },
    label=_label,
    yardstick=("of copy speed", lambda row: row["fused"]["bandwidth_fraction"], "{:.0%}"),
    goals=outcomes,
    goals_are_for={"cpu": "1 thread of a CPU with AVX-512 or AVX2", "cuda": "an NVIDIA H200"},
)
