"""Define a suite: its cases, and how to read their records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from wakesleep_ext.benchmark.measure import Case
from wakesleep_ext.benchmark.result import Record, Result, Row

TIMES, NONE = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"

Section = tuple[str, list[Row]]
"""A heading and its cases."""


class Outcome(NamedTuple):
    """A goal, and whether it was met."""

    cells: Mapping[str, str]
    """The cells of the goal's table row, by column title."""
    met: bool | None
    """None if the goal was not measured."""


@dataclass(frozen=True)
class Suite:
    """The cases to measure, and everything the reports need."""

    noun: str
    """The noun for a case, such as "op"."""
    cases: Callable[[str, bool], Sequence[Case[Any]]]
    """Returns the cases for a device type, `"cpu"` or `"cuda"`. If the second argument is true, returns only a few."""
    baselines: tuple[str, ...]
    """The baselines, whose times are reported as multiples of ours."""
    sections: Callable[[Iterable[Record]], list[Section]]
    """Groups the cases into sections, none of which is empty."""
    headline: Callable[[Iterable[Record]], list[Record]]
    """Selects the most important records, for the picture."""
    columns: Mapping[str, Callable[[Record], str]]
    """The columns that distinguish the cases of a section, keyed by title."""
    label: Callable[[Record], str]
    """Labels a case in a picture."""
    yardstick: tuple[str, Callable[[Row], float | None], str]
    """A column that compares our time with a reference: its title, its value, and the format of the value."""
    goals: Callable[[Result], list[Outcome]]
    """Checks the goals of the suite against a result."""
    goals_are_for: Mapping[str, str]
    """The hardware that the goals are set for, keyed by device type."""
    decimals: int = 1
    """Number of decimals in a baseline's time as a multiple of ours."""
    notes: Callable[[Sequence[Row]], list[str]] = lambda cases: []
    """Returns the paragraphs that are printed below the tables."""


def shape(record: Record) -> str:
    return f" {TIMES} ".join(f"{size:,}" for size in record["shape"])
