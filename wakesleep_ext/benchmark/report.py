"""A result as people read it: tables and a picture."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from wakesleep_ext import checkpoint
from wakesleep_ext.benchmark.op_suite import headline
from wakesleep_ext.benchmark.result import Record, Result, ResultError, Row, place, ratio, rows

_TIMES, _NONE = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
_NAMES = {"fused": "wakesleep_ext", "distributions": "torch.distributions", "compile": "torch.compile"}
_COLOURS = {"fused": "#d55e00", "distributions": "#999999", "compile": "#0072b2"}
"""Of Okabe and Ito's palette, which the colour-blind tell apart."""

DIGEST = "SHA-256 of the records"
"""What a picture says of itself: see :func:`digest`."""


# ---- tables ----------------------------------------------------------------------------------------------------------


def text(result: Result) -> str:
    """All records in Markdown, large cases and small ones apart, and where they were taken."""
    parts = [f"{heading}\n\n{table(part)}" for heading, part in sections(result["records"])]
    return "\n\n".join([*parts, caption(result)])


def sections(records: Iterable[Record]) -> list[tuple[str, list[Row]]]:
    """The cases with a heading: those beyond the cache, and those within; none that is empty."""
    large: list[Row] = []
    small: list[Row] = []
    for row in rows(records):
        (small if next(iter(row.values()))["bandwidth_fraction"] is None else large).append(row)
    both = (("Beyond the cache:", large), ("Within the cache, where overhead counts:", small))
    return [(heading, part) for heading, part in both if part]


def table(cases: Sequence[Row]) -> str:
    """A Markdown table, a line for each case.

    The fused op's time, median ± half the interquartile range; how many times as long the others take; the fraction of
    copy bandwidth at which it moves the bytes that must be moved; the most memory that it allocates and its largest
    error, with those of eager in brackets.
    """
    others = [name for name in ("eager", "distributions", "compile") if any(name in row for row in cases)]
    titles = ("op", "pass", "dtype", "shape", "time", *(f"{name} takes" for name in others))
    lines = [(*titles, "of copy speed", "memory (eager)", "error (eager)")]
    for row in cases:
        some, fused, eager = next(iter(row.values())), row.get("fused"), row.get("eager")
        lines.append(
            (
                f"`{some['op']}`",
                some["pass"],
                some["dtype"],
                shape(some),
                _time(fused),
                *(_NONE if (found := ratio(row, name)) is None else f"{found:.1f}{_TIMES}" for name in others),
                _fraction(fused),
                f"{_memory(fused)} ({_memory(eager)})",
                f"{_error(fused)} ({_error(eager)})",
            )
        )
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table that is legible as it stands, too; the first line has the titles."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    written = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    return "\n".join([written[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *written[1:]])


def caption(result: Result) -> str:
    """Where a result was taken, and how to take it again."""
    about = result["machine"]
    commit = f", commit {about['commit'][:7]}" if about["commit"] else ""
    modified = " with changes" if about["modified"] else ""
    where = f"{place(result)}; torch {about['torch']}{commit}{modified}"
    return f"{where}; copies at {result['copy_bandwidth_gbs']:.1f} GB/s. Measured by `{about['command']}`."


def shape(record: Record) -> str:
    return f" {_TIMES} ".join(f"{size:,}" for size in record["shape"])


def _time(record: Record | None) -> str:
    if record is None:
        return _NONE
    unit, scale = ("ms", 1e3) if record["median_us"] >= 1e3 else ("µs", 1.0)
    return f"{record['median_us'] / scale:.2f} ± {record['iqr_us'] / scale / 2:.2f} {unit}"


def _fraction(record: Record | None) -> str:
    return _NONE if record is None or record["bandwidth_fraction"] is None else f"{record['bandwidth_fraction']:.0%}"


def _memory(record: Record | None) -> str:
    if record is None:
        return _NONE
    size = record["peak_bytes"]
    if size < 1000:
        return f"{size} B"
    return f"{size / 1e3:.1f} kB" if size < 1e6 else f"{size / 1e6:.1f} MB"


def _error(record: Record | None) -> str:
    return _NONE if record is None or record["max_error"] is None else f"{record['max_error']:.0e}"


# ---- picture ---------------------------------------------------------------------------------------------------------


def plot(path: Path, result: Result) -> None:
    """Bars per op: how many times as fast as eager, on a logarithmic scale; small cases and large ones side by side.

    Args:
        path: the picture that is written, a PNG. It carries the :func:`digest` of the records.
        result: what is drawn, its :func:`headline`.

    Raises:
        ResultError: there is nothing to compare.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    panels = []
    for heading, part in sections(headline(result["records"])):
        if compared := [row for row in part if "eager" in row and len(row) > 1]:
            panels.append((heading, compared))
    if not panels:
        raise ResultError("nothing to draw: a picture compares with eager, in float32")
    height = 1.2 + 0.5 * max(len(part) for _, part in panels)
    figure = Figure(figsize=(5.5 * len(panels), height), dpi=150, layout="constrained")
    figure.suptitle(f"Times as fast as eager PyTorch, {place(result)}", fontsize=11)
    for axes, (heading, part) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for place_, candidate in enumerate(_COLOURS):
            here = [index for index, row in enumerate(part) if candidate in row]
            speedups = [part[i]["eager"]["median_us"] / part[i][candidate]["median_us"] for i in here]
            heights = [index + 0.27 * (place_ - 1) for index in here]
            # bars that start from 1: a loss points to the left
            axes.barh(heights, [s - 1 for s in speedups], 0.25, 1, color=_COLOURS[candidate], label=_NAMES[candidate])
            if candidate == "fused":
                for at, speedup in zip(heights, speedups, strict=True):
                    axes.annotate(f" {speedup:.1f}{_TIMES}", (max(speedup, 1), at), va="center", fontsize=7)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{_TIMES}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(axis="x", labelsize=8)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.margins(x=0.12, y=0.02)
        axes.set_yticks(range(len(part)), [_label(row["eager"]) for row in part], fontsize=8)
        axes.invert_yaxis()
        axes.set_title(heading.rstrip(":"), fontsize=10)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    bars, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(bars, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture, metadata={DIGEST: digest(result)})
    checkpoint.write_atomically(path, picture.getvalue())


def digest(result: Result) -> str:
    """SHA-256 of the records, in hexadecimal: tells which result a picture shows."""
    return hashlib.sha256(json.dumps(result["records"]).encode()).hexdigest()


def _label(record: Record) -> str:
    backward = " + backward" if record["pass"] == "forward+backward" else ""
    return f"{record['op']}{backward}\n{shape(record)}"
