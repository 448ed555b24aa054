"""What becomes of the figures: a JSON file, tables, a picture, and the comparison with an earlier run."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

import torch

from wakesleep_ext import checkpoint

Record = TypedDict(
    "Record",
    {
        "op": str,
        "pass": str,
        "dtype": str,
        "shape": list[int],
        "candidate": str,
        "median_us": float,
        "iqr_us": float,
        "max_error": float | None,
        "bytes": int,
        "bandwidth_fraction": float | None,
        "peak_bytes": int,
    },
)
"""A candidate on a case: median time of a call and its interquartile range in microseconds; the largest error against
float64, relative, null where only a draw could be compared; the bytes that have to be moved, the fraction of copy
bandwidth at which they were, null where the case fits the cache and the time is overhead; and the most bytes
allocated at once."""


class Result(TypedDict):
    """A run of the suite."""

    machine: dict[str, Any]
    copy_bandwidth_gbs: float
    records: list[Record]


class ResultError(ValueError):
    """A file holds no result, or none that can be compared."""


Row = dict[str, Record]
"""The records of a case, by candidate."""

_NOISE_FLOOR = 0.05
_TIMES, _NONE = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
_COLOURS = {"fused": "#c2571a", "distributions": "#35478c", "compile": "#1b7f5c"}
_NAMES = {"fused": "wakesleep_ext", "distributions": "torch.distributions", "compile": "torch.compile"}
_BLOCK = re.compile(r"(<!-- speed table: (\S+) -->\n).*?(<!-- end of speed table -->)", re.DOTALL)


# ---- files -----------------------------------------------------------------------------------------------------------


def write(path: Path, result: Result) -> None:
    """Write a result as JSON, a record a line, atomically."""
    records = ",\n".join(f"    {json.dumps(record, allow_nan=False)}" for record in result["records"])
    head = {name: value for name, value in result.items() if name != "records"}
    text = json.dumps(head, indent=2).removesuffix("\n}") + f',\n  "records": [\n{records}\n  ]\n}}\n'
    checkpoint.write_atomically(path, text.encode())


def read(path: Path) -> Result:
    """Read what :func:`write` has written.

    Raises:
        ResultError: the file is missing, or something else.
    """
    try:
        result = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ResultError(f"{path}: cannot be read: {error}") from error
    if not isinstance(result, dict) or result.keys() != Result.__annotations__.keys():
        raise ResultError(f"{path}: expected a JSON object of {', '.join(Result.__annotations__)}")
    for number, record in enumerate(result["records"]):
        if not isinstance(record, dict) or record.keys() != Record.__annotations__.keys():
            raise ResultError(f"{path}: record {number}: expected {', '.join(Record.__annotations__)}")
    return result  # type: ignore[return-value]


def machine(device: torch.device, threads: int, command: str) -> dict[str, Any]:
    """Where and with what a result was taken."""
    cuda = device.type == "cuda"
    return {
        "device": device.type,
        "processor": _processor(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "wakesleep_ext": _version(),
        **_commit(Path(__file__).resolve().parents[2]),
        "command": command,
    }


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _version() -> str | None:
    try:
        return version("wakesleep_ext")
    except PackageNotFoundError:  # a source tree that was built in place
        return None


def _commit(checkout: Path) -> dict[str, Any]:
    """The commit that the package is at, and whether tracked files differ from it; of an installed copy, none."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != checkout:
            return {"commit": None, "modified": None}
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "modified": None}


# ---- tables ----------------------------------------------------------------------------------------------------------


def rows(records: Iterable[Record]) -> list[Row]:
    """The records case by case, in the order of the suite."""
    cases: dict[tuple[Any, ...], Row] = {}
    for record in records:
        cases.setdefault(_case(record), {})[record["candidate"]] = record
    return list(cases.values())


def headline(records: Sequence[Record]) -> list[Record]:
    """What a reader wants to see first: float32, at 100 events and at the most that were measured."""
    plain = [record for record in records if record["dtype"] == "float32" and len(record["shape"]) == 2]
    chosen = []
    for record in plain:
        events = [other["shape"][0] for other in plain if other["op"] == record["op"]]
        widths = [other["shape"][1] for other in plain if other["op"] == record["op"]]
        if record["shape"][0] in (100, max(events)) and record["shape"][1] == min(widths):
            chosen.append(record)
    return chosen


def table(records: Iterable[Record]) -> str:
    """A Markdown table, a line for each case.

    The fused op's time, median ± half the interquartile range; how many times as long the others take; the fraction
    of copy bandwidth at which it moves the bytes that must be moved, where the case exceeds the cache; and its
    largest error with that of eager in brackets.
    """
    cases = rows(records)
    others = [name for name in ("eager", "distributions", "compile") if any(name in row for row in cases)]
    titles = ("op", "pass", "dtype", "shape", "time", *(f"{name} takes" for name in others), "of copy speed", "error")
    lines = [titles]
    for row in cases:
        some = next(iter(row.values()))
        fused = row.get("fused")
        lines.append(
            (
                f"`{some['op']}`",
                some["pass"],
                some["dtype"],
                _shape(some),
                _time(fused) if fused else _NONE,
                *(f"{speedup:.1f}{_TIMES}" if (speedup := _times_as_long(row, name)) else _NONE for name in others),
                f"{fused['bandwidth_fraction']:.0%}" if fused and fused["bandwidth_fraction"] is not None else _NONE,
                _error(fused) + (f" ({_error(row['eager'])})" if "eager" in row else "") if fused else _NONE,
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    written = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    return "\n".join([written[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *written[1:]])


def refresh(text: str, folder: Path) -> str:
    """A Markdown text with its speed tables made anew; they are up to date if nothing changes.

    A table stands between `<!-- speed table: FILE.json -->` and `<!-- end of speed table -->`.

    Args:
        text: the text.
        folder: what the files are named relative to.
    """

    def block(found: re.Match[str]) -> str:
        result = read(folder / found[2])
        return f"{found[1]}\n{table(headline(result['records']))}\n\n{caption(result)}\n\n{found[3]}"

    return _BLOCK.sub(block, text)


def place(result: Result) -> str:
    """The GPU, or the CPU with its instruction set and threads."""
    about = result["machine"]
    plural = "s" * (about["threads"] != 1)
    return about["gpu"] or f"{about['processor']}, {about['simd']}, {about['threads']} thread{plural}"


def caption(result: Result) -> str:
    """Where a result was taken, and how to take it again."""
    about = result["machine"]
    commit = f", commit {about['commit'][:7]}" if about["commit"] else ""
    modified = " with changes" if about["modified"] else ""
    where = f"{place(result)}; torch {about['torch']}{commit}{modified}"
    return f"{where}; copies at {result['copy_bandwidth_gbs']:.1f} GB/s. Measured by `{about['command']}`."


def _case(record: Record) -> tuple[Any, ...]:
    return record["op"], record["pass"], record["dtype"], tuple(record["shape"])


def _times_as_long(row: Row, candidate: str) -> float | None:
    if candidate not in row or "fused" not in row:
        return None
    return row[candidate]["median_us"] / row["fused"]["median_us"]


def _time(record: Record) -> str:
    unit, scale = ("ms", 1e3) if record["median_us"] >= 1e3 else ("µs", 1.0)
    return f"{record['median_us'] / scale:.2f} ± {record['iqr_us'] / scale / 2:.2f} {unit}"


def _shape(record: Record) -> str:
    return f" {_TIMES} ".join(f"{size:,}" for size in record["shape"])


def _error(record: Record) -> str:
    return _NONE if record["max_error"] is None else f"{record['max_error']:.1e}"


# ---- verdicts --------------------------------------------------------------------------------------------------------


def inaccurate(records: Iterable[Record]) -> list[str]:
    """The cases where the fused op errs by more than twice what eager does, and a rounding of the inputs."""
    found = []
    for row in rows(records):
        if "fused" not in row or "eager" not in row:
            continue
        error, of_eager = row["fused"]["max_error"], row["eager"]["max_error"]
        if error is None or of_eager is None:
            continue
        rounding = torch.finfo(getattr(torch, row["fused"]["dtype"].split(",")[0])).eps
        if error > 2 * of_eager + rounding:
            found.append(f"{_title(row['fused'])}: error {error:.1e}, eager's {of_eager:.1e}")
    return found


def regressions(old: Result, new: Result) -> list[str]:
    """The cases where the fused op has become slower, in words.

    What is compared is its time in units of eager's, or where either run lacks eager, its time: the candidates take
    turns, so that the load of the machine cancels. A case counts if that has grown by more than 5% and the noise: the
    interquartile ranges of all medians that enter, relative to these, added as squares.

    Raises:
        ResultError: no case of the one run is in the other.
    """
    before = {_case(row["fused"]): row for row in rows(old["records"]) if "fused" in row}
    after = [row for row in rows(new["records"]) if "fused" in row and _case(row["fused"]) in before]
    if not after:
        raise ResultError("the two results have no case of the fused ops in common")
    found = []
    for row in after:
        earlier = before[_case(row["fused"])]
        relative = "eager" in row and "eager" in earlier
        times = [(run["fused"], run["eager"] if relative else None) for run in (earlier, row)]
        then, now = (fused["median_us"] / (eager["median_us"] if eager else 1) for fused, eager in times)
        spreads = [record["iqr_us"] / record["median_us"] for pair in times for record in pair if record]
        margin = 1 + _NOISE_FLOOR + math.hypot(*spreads)
        if now > margin * then:
            unit = " relative to eager" if relative else ""
            title = _title(row["fused"])
            found.append(f"{title}: takes {now / then:.2f} times as long as before{unit}, noise up to {margin:.2f}")
    return found


def _title(record: Record) -> str:
    return f"{record['op']} {record['pass']} {record['dtype']} {record['shape']}"


# ---- picture ---------------------------------------------------------------------------------------------------------


def plot(path: Path, result: Result) -> None:
    """Bars per op: how many times as fast as eager, on a logarithmic scale; small cases left, large ones right.

    Args:
        path: the picture that is written, a PNG. It carries the digest of the records, for :func:`is_plot_of`.
        result: what is drawn, its :func:`headline`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    cases = [row for row in rows(headline(result["records"])) if "eager" in row]
    small = [row for row in cases if row["eager"]["bandwidth_fraction"] is None]
    large = [row for row in cases if row["eager"]["bandwidth_fraction"] is not None]
    panels = [(name, part) for name, part in (("small: overhead", small), ("beyond the cache", large)) if part]
    height = 1.4 + 0.45 * max((len(part) for _, part in panels), default=0)
    figure = Figure(figsize=(5.5 * max(len(panels), 1), height), dpi=150, layout="constrained")
    figure.suptitle("Speed relative to eager PyTorch", fontsize=12)
    for axes, (name, part) in zip(figure.subplots(1, max(len(panels), 1), squeeze=False)[0], panels, strict=False):
        for place, candidate in enumerate(_COLOURS):
            here = [index for index, row in enumerate(part) if candidate in row]
            speedups = [part[i]["eager"]["median_us"] / part[i][candidate]["median_us"] for i in here]
            heights = [index + 0.27 * (place - 1) for index in here]
            # bars that start from 1: a loss points to the left
            axes.barh(heights, [s - 1 for s in speedups], 0.25, 1, color=_COLOURS[candidate], label=_NAMES[candidate])
            if candidate == "fused":
                for at, speedup in zip(heights, speedups, strict=True):
                    axes.annotate(f" {speedup:.1f}{_TIMES}", (max(speedup, 1), at), va="center", fontsize=7)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{_TIMES}"))
        axes.axvline(1, color="black", linewidth=0.8)
        axes.margins(x=0.12)
        axes.set_yticks(range(len(part)), [_label(row["eager"]) for row in part], fontsize=8)
        axes.invert_yaxis()
        axes.set_title(name, fontsize=10)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if panels:
        figure.axes[0].legend(frameon=False, fontsize=8, loc="best")
    FigureCanvasAgg(figure).print_png(path, metadata={_DIGEST: _digest(result)})


def is_plot_of(path: Path, result: Result) -> bool:
    """Whether a picture was drawn from just these records."""
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get(_DIGEST) == _digest(result)


_DIGEST = "SHA-256 of the records"


def _digest(result: Result) -> str:
    return hashlib.sha256(json.dumps(result["records"]).encode()).hexdigest()


def _label(record: Record) -> str:
    backward = " + backward" if record["pass"] == "forward+backward" else ""
    return f"{record['op']}{backward}\n{_shape(record)}"
