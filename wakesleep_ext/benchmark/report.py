"""Report a result as Markdown tables and as a picture."""

from __future__ import annotations

import hashlib
import io
import json
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from wakesleep_ext._files import write_atomically
from wakesleep_ext.benchmark.losses import slower
from wakesleep_ext.benchmark.result import Record, Result, ResultError, Row, any_record, place, ratio, rows
from wakesleep_ext.benchmark.suite import NONE, TIMES, Section, Suite

CANDIDATES = {
    "fused": ("wakesleep_ext", "#d55e00", "o"),
    "jax": ("JAX", "#e69f00", "P"),
    "distributions": ("torch.distributions", "#777777", "s"),
    "compile": ("torch.compile", "#0072b2", "o"),
    "compile with graphs": ("torch.compile with graphs", "#56b4e9", "D"),
    "compiled step": ("torch.compile of the whole step", "#0072b2", "v"),
    "max-autotune": ("torch.compile, max-autotune", "#56b4e9", "X"),
    "eager in a graph": ("eager in one CUDA graph", "#777777", "h"),
    "compiled in a graph": ("compiled in one CUDA graph", "#cc79a7", "D"),
    "torch fused": ("torch.optim, fused", "#cc79a7", "^"),
    "products": ("its matrix products alone", "#009e73", "|"),
}
"""Labels, colours and markers in pictures. Colour-blind readers can distinguish the colours (Okabe and Ito)."""

DIGEST = "SHA-256 of the records"
"""The key in a picture's metadata under which its :func:`digest` is stored."""


# ---- tables ----------------------------------------------------------------------------------------------------------

_WIDTH = 100
"""Characters per line of a narrow report."""

_SHORT = {
    "distributions": "distrib.",
    "compile with graphs": "with graphs",
    "compiled step": "compiled",
    "max-autotune": "autotuned",
    "eager in a graph": "graph",
    "compiled in a graph": "compiled graph",
    "torch fused": "fused",
    "of copy speed": "of copy",
    "over its products": "over products",
}
"""Shorter column titles for narrow tables."""

_KIND = ("pass", "dtype")
"""Columns that a narrow table omits and shows in its heading instead."""


def text(result: Result, suite: Suite, *, narrow: bool = False) -> str:
    """Format all records of a suite in Markdown, with the cases where a baseline is faster, notes and a caption.

    Args:
        result: The records, and the hardware.
        suite: The suite that the records belong to.
        narrow: Limit lines to 100 characters. Paragraphs are wrapped. The tables show only the suite's headline. Each
            pass and dtype has its own table, which contains only medians and ratios.
    """
    records = result["records"]
    sections = suite.sections(suite.headline(records) if narrow else records)
    paragraphs = [*slower(records, suite), *suite.notes(rows(records)), caption(result)]
    if narrow:
        sections = [part for section in sections for part in _by_kind(*section, suite)]
        paragraphs = ["\n".join(map(_wrapped, paragraph.splitlines())) for paragraph in paragraphs]
    tables = [f"{heading}\n\n{table(part, suite, narrow=narrow)}" for heading, part in sections]
    return "\n\n".join([*tables, *paragraphs])


def table(cases: Sequence[Row], suite: Suite, *, narrow: bool = False) -> str:
    """Format cases as a Markdown table with one row per case.

    The columns are our median time ± half its interquartile range, the baselines' times as multiples of ours, and the
    suite's yardstick. The next columns are peak memory, the largest error and the number of kernels launched on a GPU,
    each with the value for eager in brackets. A narrow table omits the range, pass, dtype, and the columns with
    brackets.
    """
    columns = {title: _of_any(cell) for title, cell in suite.columns.items()}
    if narrow:
        columns = {title: cell for title, cell in columns.items() if title not in _KIND}
    columns["time"] = lambda row: _time(row.get("fused"), spread=not narrow)
    for name in suite.baselines:
        if any(name in row for row in cases):
            title = _SHORT.get(name, name) if narrow else f"{name} takes"
            columns[title] = partial(_times_of, name=name, decimals=suite.decimals)
    yardstick, measured, form = suite.yardstick
    held = partial(_held, measured=measured, form=form)
    if not narrow:
        columns[yardstick] = held
        for name, cell in _COMPARED.items():
            if name != "launches" or any(record.get(name) is not None for row in cases for record in row.values()):
                columns[f"{name} (eager)"] = partial(_with_eager, cell=cell)
    elif any(held(row) != NONE for row in cases):
        columns[_SHORT.get(yardstick, yardstick)] = held
    return markdown([tuple(columns), *(tuple(cell(row) for cell in columns.values()) for row in cases)])


def _by_kind(heading: str, cases: Sequence[Row], suite: Suite) -> list[Section]:
    """Split a section by pass and dtype, and add the pass and dtype to the headings."""
    parts: dict[str, list[Row]] = {}
    for row in cases:
        kind = [suite.columns[title](any_record(row)) for title in _KIND if title in suite.columns]
        parts.setdefault(", ".join([heading.removesuffix(":"), *kind]) + ":", []).append(row)
    return list(parts.items())


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table with aligned columns. The first line contains the titles."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    written = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    return "\n".join([written[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *written[1:]])


def _wrapped(line: str) -> str:
    hanging = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, _WIDTH, subsequent_indent=hanging, break_on_hyphens=False)


def caption(result: Result) -> str:
    """Describe the hardware and software of a result, and the command that measured it."""
    about = result["machine"]
    commit = f", commit {about['commit'][:7]}" if about["commit"] else ""
    modified = " with changes" if about["modified"] else ""
    where = f"{place(result)}; torch {about['torch']}{commit}{modified}"
    return f"{where}; copies at {result['copy_bandwidth_gbs']:.1f} GB/s. Measured by `{about['command']}`."


def _of_any(cell: Callable[[Record], str]) -> Callable[[Row], str]:
    return lambda row: cell(any_record(row))


def _times_of(row: Row, name: str, decimals: int) -> str:
    return _times(ratio(row, name), decimals)


def _held(row: Row, measured: Callable[[Row], float | None], form: str) -> str:
    held = measured(row) if "fused" in row else None
    return NONE if held is None else form.format(held)


def _with_eager(row: Row, cell: Callable[[Record | None], str]) -> str:
    return f"{cell(row.get('fused'))} ({cell(row.get('eager'))})"


def _time(record: Record | None, spread: bool = True) -> str:
    if record is None:
        return NONE
    unit, scale = ("ms", 1e3) if record["median_us"] >= 1e3 else ("µs", 1.0)
    half_range = f" ± {record['iqr_us'] / scale / 2:.2f}" if spread else ""
    return f"{record['median_us'] / scale:.2f}{half_range} {unit}"


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


_COMPARED = {"memory": _memory, "error": _error, "launches": _launches}
"""The columns that show our value and, in brackets, the value for eager, keyed by title."""


# ---- picture ---------------------------------------------------------------------------------------------------------


def plot(path: Path, result: Result, suite: Suite) -> None:
    """Plot each case's speed-up over eager as a bar, on a logarithmic scale, with one panel per section.

    Args:
        path: the PNG file to write. Its metadata contain the :func:`digest` of the records.
        result: the result. Only the suite's headline records are drawn.
        suite: the suite that the result belongs to.

    Raises:
        ResultError: no case was measured with both eager and another implementation.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    panels = []
    for heading, part in suite.sections(suite.headline(result["records"])):
        if compared := [row for row in part if "eager" in row and len(row) > 1]:
            panels.append((heading, compared))
    if not panels:
        raise ResultError("nothing to draw: expected float32 results of eager and another implementation")
    drawn = [name for name in CANDIDATES if any(name in row for _, part in panels for row in part)]
    width = 0.81 / max(len(drawn), 3)
    height = 1.2 + 0.5 * max(len(part) for _, part in panels)
    figure = Figure(figsize=(5.5 * len(panels), height), dpi=150, layout="constrained")
    figure.suptitle(f"Times as fast as eager PyTorch, {place(result)}", fontsize=11)
    for axes, (heading, part) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for place_, candidate in enumerate(drawn):
            here = [index for index, row in enumerate(part) if candidate in row]
            speedups = [part[i]["eager"]["median_us"] / part[i][candidate]["median_us"] for i in here]
            heights = [index + width * (place_ - (len(drawn) - 1) / 2) for index in here]
            # bars start at 1, so that the bar of a slowdown points to the left
            name, colour, _ = CANDIDATES[candidate]
            axes.barh(heights, [s - 1 for s in speedups], 0.93 * width, 1, color=colour, label=name)
            axes.plot(speedups, heights, "o", color=colour, markersize=3.5)  # a bar that ends at 1 has no length
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
    """Return the SHA-256 of the records in hexadecimal, which identifies the result that a picture shows."""
    return hashlib.sha256(json.dumps(result["records"]).encode()).hexdigest()
