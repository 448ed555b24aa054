"""What a suite is: its cases, and how the records of these are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from wakesleep_ext.benchmark.measure import Case
from wakesleep_ext.benchmark.result import Record, Result, Row

TIMES, NONE = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"

Section = tuple[str, list[Row]]
"""Cases under a heading."""


class Outcome(NamedTuple):
    """A goal that was set, and what came of it."""

    cells: Mapping[str, str]
    """What is written of it, by title."""
    met: bool | None
    """None if it was not measured."""


@dataclass(frozen=True)
class Suite:
    """What is measured, and all that telling of it asks of a suite."""

    noun: str
    """What a case is one of."""
    cases: Callable[[str, bool], Sequence[Case[Any]]]
    """The cases for a kind of device, `"cpu"` or `"cuda"`; few or all."""
    rivals: tuple[str, ...]
    """The candidates whose time is given in units of ours."""
    faster_than: tuple[str, ...]
    """Those of them that no case may be slower than."""
    sections: Callable[[Iterable[Record]], list[Section]]
    """The cases in groups, none of them empty."""
    headline: Callable[[Iterable[Record]], list[Record]]
    """What a reader wants to see first."""
    columns: Mapping[str, Callable[[Record], str]]
    """What tells the cases of a section apart, by title."""
    label: Callable[[Record], str]
    """The same in a picture."""
    yardstick: tuple[str, Callable[[Row], float | None], str]
    """What our time is held to: its title, the figure, and the format of that."""
    goals: Callable[[Result], list[Outcome]]
    """The goals that are set for it, in view of a result."""
    goals_are_for: Mapping[str, str]
    """The machine that they are set for, by kind of device."""
    decimals: int = 1
    """Of how many times as long the rivals take."""
    notes: Callable[[Sequence[Row]], list[str]] = lambda cases: []
    """What follows from the figures: paragraphs below the tables."""


def shape(record: Record) -> str:
    return f" {TIMES} ".join(f"{size:,}" for size in record["shape"])
