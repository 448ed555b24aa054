"""A result as people read it: tables and a picture."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

from wakesleep_ext._files import write_atomically
from wakesleep_ext.benchmark.result import Record, Result, ResultError, Row, place, ratio, rows
from wakesleep_ext.benchmark.suite import NONE, TIMES, Suite

_BARS = {
    "fused": ("wakesleep_ext", "#d55e00"),
    "distributions": ("torch.distributions", "#999999"),
    "compile": ("torch.compile", "#0072b2"),
    "compile with graphs": ("torch.compile with graphs", "#56b4e9"),
    "products": ("its matrix products alone", "#009e73"),
}
"""Names, and colours of Okabe and Ito's palette, which the colour-blind tell apart."""

DIGEST = "SHA-256 of the records"
"""What a picture says of itself: see :func:`digest`."""


# ---- tables ----------------------------------------------------------------------------------------------------------


def text(result: Result, suite: Suite) -> str:
    """All records of a suite in Markdown, what follows from them, and where they were taken."""
    parts = [f"{heading}\n\n{table(part, suite)}" for heading, part in suite.sections(result["records"])]
    return "\n\n".join([*parts, *suite.notes(rows(result["records"])), caption(result)])


def table(cases: Sequence[Row], suite: Suite) -> str:
    """A Markdown table, a line for each case.

    Our time, median ± half the interquartile range; how many times as long the others take; what the suite holds our
    time to; the most memory that is allocated, the largest error, and the kernels launched on a GPU, with those of
    eager in brackets.
    """
    others = [name for name in suite.rivals if any(name in row for row in cases)]
    yardstick, measured, form = suite.yardstick
    beside_eager = {"memory": _memory, "error": _error}
    if any("launches" in record and record["launches"] is not None for row in cases for record in row.values()):
        beside_eager["launches"] = _launches
    titles = (*suite.columns, "time", *(f"{name} takes" for name in others), yardstick)
    lines = [(*titles, *(f"{name} (eager)" for name in beside_eager))]
    for row in cases:
        some, fused, eager = next(iter(row.values())), row.get("fused"), row.get("eager")
        held = measured(row) if fused else None
        lines.append(
            (
                *(cell(some) for cell in suite.columns.values()),
                _time(fused),
                *(_times(ratio(row, name), suite.decimals) for name in others),
                NONE if held is None else form.format(held),
                *(f"{cell(fused)} ({cell(eager)})" for cell in beside_eager.values()),
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


def _time(record: Record | None) -> str:
    if record is None:
        return NONE
    unit, scale = ("ms", 1e3) if record["median_us"] >= 1e3 else ("µs", 1.0)
    return f"{record['median_us'] / scale:.2f} ± {record['iqr_us'] / scale / 2:.2f} {unit}"


def _times(ratio: float | None, decimals: int) -> str:
    return NONE if ratio is None else f"{ratio:.{decimals}f}{TIMES}"


def _memory(record: Record | None) -> str:
    if record is None:
        return NONE
    size = record["peak_bytes"]
    if size < 1000:
        return f"{size} B"
    return f"{size / 1e3:.1f} kB" if size < 1e6 else f"{size / 1e6:.1f} MB"


def _error(record: Record | None) -> str:
    return NONE if record is None or record["max_error"] is None else f"{record['max_error']:.0e}"


def _launches(record: Record | None) -> str:
    count = record.get("launches") if record else None
    return NONE if count is None else str(count)


# ---- picture ---------------------------------------------------------------------------------------------------------


def plot(path: Path, result: Result, suite: Suite) -> None:
    """Bars per case: how many times as fast as eager, on a logarithmic scale; the suite's sections side by side.

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
    for heading, part in suite.sections(suite.headline(result["records"])):
        if compared := [row for row in part if "eager" in row and len(row) > 1]:
            panels.append((heading, compared))
    if not panels:
        raise ResultError("nothing to draw: a picture compares with eager, in float32")
    drawn = [name for name in _BARS if any(name in row for _, part in panels for row in part)]
    width = 0.81 / max(len(drawn), 3)
    height = 1.2 + 0.5 * max(len(part) for _, part in panels)
    figure = Figure(figsize=(5.5 * len(panels), height), dpi=150, layout="constrained")
    figure.suptitle(f"Times as fast as eager PyTorch, {place(result)}", fontsize=11)
    for axes, (heading, part) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for place_, candidate in enumerate(drawn):
            here = [index for index, row in enumerate(part) if candidate in row]
            speedups = [part[i]["eager"]["median_us"] / part[i][candidate]["median_us"] for i in here]
            heights = [index + width * (place_ - (len(drawn) - 1) / 2) for index in here]
            # bars that start from 1: a loss points to the left
            name, colour = _BARS[candidate]
            axes.barh(heights, [s - 1 for s in speedups], 0.93 * width, 1, color=colour, label=name)
            if candidate == "fused":
                for at, speedup in zip(heights, speedups, strict=True):
                    beyond = f" {_times(speedup, suite.decimals)}"
                    axes.annotate(beyond, (max(speedup, 1), at), va="center", fontsize=7)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{TIMES}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(axis="x", labelsize=8)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.margins(x=0.12, y=0.02)
        axes.set_yticks(range(len(part)), [suite.label(row["eager"]) for row in part], fontsize=8)
        axes.invert_yaxis()
        axes.set_title(heading.rstrip(":"), fontsize=10)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    bars, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(bars, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture, metadata={DIGEST: digest(result)})
    write_atomically(path, picture.getvalue())


def digest(result: Result) -> str:
    """SHA-256 of the records, in hexadecimal: tells which result a picture shows."""
    return hashlib.sha256(json.dumps(result["records"]).encode()).hexdigest()
