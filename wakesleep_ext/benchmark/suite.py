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
    """The cells of its table row, by column title."""
    met: bool | None
    """None if it was not measured."""


@dataclass(frozen=True)
class Suite:
    """The cases to measure, and everything the reports need."""

    noun: str
    """What a case is called, such as "op"."""
    cases: Callable[[str, bool], Sequence[Case[Any]]]
    """Returns the cases for a device type, `"cpu"` or `"cuda"`; only a few if the second argument is true."""
    rivals: tuple[str, ...]
    """The implementations whose time is given as a multiple of ours."""
    faster_than: tuple[str, ...]
    """The baselines that every case should beat."""
    sections: Callable[[Iterable[Record]], list[Section]]
    """Groups the cases; no group is empty."""
    headline: Callable[[Iterable[Record]], list[Record]]
    """Selects the records that a reader wants to see first."""
    columns: Mapping[str, Callable[[Record], str]]
    """Columns that tell the cases of a section apart, by title."""
    label: Callable[[Record], str]
    """Labels a case in a picture."""
    yardstick: tuple[str, Callable[[Row], float | None], str]
    """The reference for our time: its title, the figure, and the format of the figure."""
    goals: Callable[[Result], list[Outcome]]
    """Checks the goals of the suite against a result."""
    goals_are_for: Mapping[str, str]
    """The hardware that the goals are set for, by device type."""
    decimals: int = 1
    """Decimals of the baselines' times as multiples of ours."""
    notes: Callable[[Sequence[Row]], list[str]] = lambda cases: []
    """Derives paragraphs below the tables from the figures."""


def shape(record: Record) -> str:
    return f" {TIMES} ".join(f"{size:,}" for size in record["shape"])
