"""Update the tables and pictures of README.md and docs/benchmarks.md from committed results: `make readme`.

- `<!-- speed: FILE.json -->` to `<!-- end of speed -->`: the tables of a `wakesleep bench` result, and its picture.
- `<!-- mnist: FILE.json -->` to `<!-- end of mnist -->`: likelihoods of the objectives.
- `docs/speed.png`, the README's first picture: an overview of the results in docs/benchmarks.md.

A package index shows the README without the repository. So its links become absolute once `[project.urls]` in
pyproject.toml names a repository on GitHub.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import mnist_objectives

from wakesleep_ext._files import write_atomically
from wakesleep_ext.benchmark import losses, report
from wakesleep_ext.benchmark.result import Result, Row, place, read
from wakesleep_ext.benchmark.run import suite_of
from wakesleep_ext.benchmark.suite import TIMES

ROOT = Path(__file__).resolve().parent.parent
README, BENCHMARKS, OVERVIEW = "README.md", "docs/benchmarks.md", "docs/speed.png"

_SECTION = re.compile(r"(<!-- (speed|mnist): (\S+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)
_REPOSITORY = re.compile(r'^\w+ = "(https://github\.com/[\w-]+/[\w.-]+?)/?"', re.MULTILINE)
_LINK = re.compile(r"(!?)\[([^]]*)\]\((?:https://github\.com/[\w-]+/[\w.-]+/(?:blob|raw)/HEAD/)?([\w./-]+)\)")


# ---- sections --------------------------------------------------------------------------------------------------------


def results(text: str) -> list[Path]:
    """Return the paths of benchmark results that a Markdown text names, relative to its folder."""
    return [Path(name) for _, kind, name, _ in _SECTION.findall(text) if kind == "speed"]


def refresh(text: str, folder: Path) -> str:
    """Rewrite the sections from their results. Returns an up-to-date text unchanged."""

    def section(found: re.Match[str]) -> str:
        begin, kind, name, end = found.groups()
        made = _speed(Path(name), read(folder / name)) if kind == "speed" else _likelihoods(folder / name)
        return f"{begin}\n{made}\n\n{end}"

    return _SECTION.sub(section, text)


def prose(text: str) -> str:
    """Return a text without its sections."""
    return _SECTION.sub("", text)


def _likelihoods(path: Path) -> str:
    return mnist_objectives.summary(json.loads(path.read_text()))


def _speed(path: Path, result: Result) -> str:
    suite = suite_of(result)
    picture = f"![Bars: speed-up of each {suite.noun}]({path.with_suffix('.png')})"
    return f"{picture}\n\n{report.text(result, suite, narrow=True)}"


# ---- links -----------------------------------------------------------------------------------------------------------


def repository(pyproject: str) -> str | None:
    """Return the address of a GitHub repository among the project's URLs, or None."""
    urls = re.search(r"^\[project\.urls\]\n(.*?)(?=^\[|\Z)", pyproject, re.MULTILINE | re.DOTALL)
    found = _REPOSITORY.search(urls[1]) if urls else None
    return found[1] if found else None


def relink(text: str, address: str | None) -> str:
    """Make links to files of the checkout point to a GitHub repository, or to the checkout if there is none."""

    def link(found: re.Match[str]) -> str:
        image, label, path = found.groups()
        folder = f"{address}/{'raw' if image else 'blob'}/HEAD/" if address else ""
        return f"{image}[{label}]({folder}{path})"

    return _LINK.sub(link, text)


# ---- overview --------------------------------------------------------------------------------------------------------


def pictured(found: Sequence[Result]) -> list[Result]:
    """Return the first result of each suite and kind of device."""
    first: dict[tuple[str, str], Result] = {}
    for result in found:
        first.setdefault((suite_of(result).noun, result["machine"]["device"]), result)
    return list(first.values())


def overview(path: Path, figures: Sequence[Result]) -> None:
    """Plot several results in one picture, with a column for each kind of device and a row for each suite.

    Args:
        path: The PNG file to write. Its metadata contain the :func:`digest` of the records.
        figures: At most one result for each suite and kind of device.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    suites = list(dict.fromkeys(suite_of(result).noun for result in figures))
    devices = sorted({result["machine"]["device"] for result in figures}, reverse=True)
    cases = {id(result): _cases(result) for result in figures}
    labels = {noun: _labels([cases[id(r)] for r in figures if suite_of(r).noun == noun]) for noun in suites}
    heights = [len(labels[noun]) for noun in suites]
    size = (8, 1.2 + 0.27 * sum(heights) + 0.7 * len(suites))
    figure = Figure(figsize=size, dpi=200, layout="constrained")
    grid = figure.subplots(
        len(suites), len(devices), sharey="row", sharex="all", squeeze=False, height_ratios=[h + 1 for h in heights]
    )
    for result in figures:
        noun, rows = suite_of(result).noun, cases[id(result)]
        axes = grid[suites.index(noun)][devices.index(result["machine"]["device"])]
        places = [labels[noun].index(label) for label in rows]
        speedups = [_speedup(row, "fused") for row in rows.values()]
        axes.barh(places, [s - 1 for s in speedups], 0.55, 1, color="#d55e00", label="wakesleep_ext")
        for at, speedup, row in zip(places, speedups, rows.values(), strict=True):
            beyond = max(_speedup(row, name) for name in row if name != "products")
            axes.annotate(
                f"{speedup:.1f}{TIMES}", (beyond, at), (5, 0), textcoords="offset points", va="center", size=8.5
            )
        for name, (label, colour, marker) in report.CANDIDATES.items():
            if name in ("fused", "products"):
                continue
            if points := [
                (_speedup(row, name), at) for at, row in zip(places, rows.values(), strict=True) if name in row
            ]:
                style = {"color": colour, "edgecolor": "white", "linewidth": 0.5, "zorder": 3}
                axes.scatter(*zip(*points, strict=True), 26, marker=marker, label=label, **style)
        axes.axvline(1, color="black", linewidth=1.2)
        axes.set_yticks(range(len(labels[noun])), labels[noun], size=8.5)
        axes.set_ylim(len(labels[noun]) - 0.4, -0.6)
        lost, total = losses.count(result["records"], suite_of(result))
        axes.set_title(f"{noun.capitalize()}s, {place(result)}\nslower in {lost} of {total} comparisons", size=9.5)
    for axes in grid.flat:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{TIMES}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(axis="x", labelsize=8.5, labelbottom=True)
        axes.margins(x=0.14)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"times as fast as eager PyTorch (logarithmic; the line at 1{TIMES} is eager)", size=9.5)
    drawn = [pair for axes in grid.flat for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in drawn}
    names = [label for label, *_ in report.CANDIDATES.values() if label in handles]
    figure.legend(
        [handles[n] for n in names],
        names,
        loc="outside upper center",
        ncols=min(len(names), 4),
        frameon=False,
        fontsize=9,
    )
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture, metadata={report.DIGEST: digest(figures)})
    write_atomically(path, picture.getvalue())


def digest(figures: Sequence[Result]) -> str:
    """Return a digest that identifies the results in a picture."""
    return hashlib.sha256("".join(map(report.digest, figures)).encode()).hexdigest()


def _cases(result: Result) -> dict[str, Row]:
    """Select the cases by a fixed rule. For ops: the largest case, with the backward pass if there is one. For steps:
    the fewest and the most samples for each batch size.
    """
    suite, chosen = suite_of(result), {}
    for _, rows in suite.sections(suite.headline(result["records"])):
        for row in rows:
            record = row["fused"]
            if suite.noun == "op":
                _, largest = chosen.get(record["op"], ("", row))
                if "eager" in row and record["bytes"] >= largest["fused"]["bytes"]:
                    backward = " + backward" if record["pass"] != "forward" else ""
                    chosen[record["op"]] = (f"{record['op']}{backward}", row)
            else:
                samples, batch, _ = record["shape"]
                few = min(other["fused"]["shape"][0] for other in rows)
                many = max(other["fused"]["shape"][0] for other in rows)
                if samples in (few, many):
                    chosen[str(record)] = (f"{record['op']}, batch {batch:,}, L = {samples}", row)
    return dict(chosen.values())


def _labels(cases: Sequence[dict[str, Row]]) -> list[str]:
    """Return the labels of all results of a suite, in the order of the longest result, so that equal cases align."""
    return list(dict.fromkeys(label for rows in sorted(cases, key=len, reverse=True) for label in rows))


def _speedup(row: Row, candidate: str) -> float:
    return row["eager"]["median_us"] / row[candidate]["median_us"]


# ---- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    for page in (ROOT / README, ROOT / BENCHMARKS):
        text = refresh(page.read_text(), page.parent)
        for path in results(text):
            result = read(page.parent / path)
            report.plot((page.parent / path).with_suffix(".png"), result, suite_of(result))
        if page.name == README:
            text = relink(text, repository((ROOT / "pyproject.toml").read_text()))
        write_atomically(page, text.encode())
    benchmarks = ROOT / BENCHMARKS
    found = [read(benchmarks.parent / path) for path in results(benchmarks.read_text())]
    overview(ROOT / OVERVIEW, pictured(found))


if __name__ == "__main__":
    main()
