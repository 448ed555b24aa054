"""Store the result of a run as JSON, with its records and environment, and compare it with an earlier run."""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict, cast, get_args, get_origin, get_type_hints, is_typeddict

import torch

from wakesleep_ext._files import write_atomically
from wakesleep_ext.info import commit_of

_Record = TypedDict(
    "_Record",
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


class Record(_Record, total=False):
    """A measurement of one implementation on one case.

    `median_us` and `iqr_us` are the median time of a call and its interquartile range, in microseconds. `max_error` is
    the largest relative error compared with float64, or null if it cannot be determined. `bytes` is the minimum memory
    traffic of a call. `bandwidth_fraction` is the bandwidth of the call divided by the bandwidth of a copy, or null if
    the call is not memory-bound. `peak_bytes` is the peak of the memory that a call allocates.
    """

    launches: int | None
    """Number of kernels that a call launches on a GPU; null on a CPU, and absent in older files."""


class Machine(TypedDict):
    """The hardware and software of a benchmark run."""

    device: str
    processor: str
    simd: str
    cores: int | None
    threads: int
    gpu: str | None
    python: str
    torch: str
    cuda: str | None
    wakesleep_ext: str | None
    commit: str | None
    """The Git commit of the package; null if the package was not imported from its Git checkout."""
    modified: bool | None
    """True if tracked files differed from `commit`."""
    command: str


class _Result(TypedDict):
    machine: Machine
    copy_bandwidth_gbs: float
    records: list[Record]


class Result(_Result, total=False):
    """The result of running a suite."""

    suite: str
    """Name of the suite; absent in files from the time when there was only one suite."""


class ResultError(ValueError):
    """A file does not contain a valid result, or its result does not suit the request."""


Row = dict[str, Record]
"""The records of a case, by implementation."""

_NOISE_FLOOR = 0.05


def write(path: Path, result: Result) -> None:
    """Write a result as JSON, one record per line, atomically."""
    records = ",\n".join(f"    {json.dumps(record, allow_nan=False)}" for record in result["records"])
    head = {name: value for name, value in result.items() if name != "records"}
    text = json.dumps(head, indent=2).removesuffix("\n}") + f',\n  "records": [\n{records}\n  ]\n}}\n'
    write_atomically(path, text.encode())


def read(path: Path) -> Result:
    """Read a result that :func:`write` has written.

    Raises:
        ResultError: the file is missing, or is not a result.
    """
    try:
        result = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ResultError(f"{path}: cannot be read: {error}") from error
    try:
        _check("result", result, Result)
        for number, record in enumerate(result["records"]):
            if not record["median_us"] > 0:
                raise ValueError(f"result.records[{number}].median_us: expected > 0, got {record['median_us']}")
    except ValueError as error:
        raise ResultError(f"{path}: {error}") from error
    return cast(Result, result)


def _check(where: str, value: Any, hint: Any) -> None:
    """Check that a value from a JSON file has the expected type; objects may have additional keys."""
    if get_origin(hint) is list and isinstance(value, list):
        for number, element in enumerate(value):
            _check(f"{where}[{number}]", element, *get_args(hint))
    elif is_typeddict(hint) and isinstance(value, dict):
        for name, inner in get_type_hints(hint).items():
            if name in value:
                _check(f"{where}.{name}", value[name], inner)
            elif name in hint.__required_keys__:
                raise ValueError(f"{where}: has no {name}")
    elif is_typeddict(hint) or get_origin(hint) is list or not isinstance(value, hint):
        expected = "an object" if is_typeddict(hint) else getattr(hint, "__name__", hint)
        raise ValueError(f"{where}: expected {expected}, got {value!r:.40}")


# ---- the environment -------------------------------------------------------------------------------------------------


def machine(device: torch.device, threads: int, command: str) -> Machine:
    """Describe the hardware, the software versions and the commit of this run."""
    commit, modified = commit_of(Path(__file__).resolve().parents[2])
    return {
        "device": device.type,
        "processor": _processor(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "wakesleep_ext": _version(),
        "commit": commit,
        "modified": modified,
        "command": command,
    }


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = found[1] if found else platform.processor() or platform.machine()
    return " ".join(re.sub(r"\((R|TM)\)|\bProcessor\b|\bCPU\b|@.*", "", name).split())


def _version() -> str | None:
    try:
        return version("wakesleep_ext")
    except PackageNotFoundError:  # a source tree built in place
        return None


def place(result: Result) -> str:
    """Return the name of the GPU, or the name of the CPU with its instruction set and the number of threads."""
    about = result["machine"]
    plural = "s" * (about["threads"] != 1)
    return about["gpu"] or f"{about['processor']}, {about['simd']}, {about['threads']} thread{plural}"


# ---- verdicts --------------------------------------------------------------------------------------------------------


def rows(records: Iterable[Record]) -> list[Row]:
    """Group the records by case, in the order of the suite."""
    cases: dict[tuple[Any, ...], Row] = {}
    for record in records:
        cases.setdefault(_case(record), {})[record["candidate"]] = record
    return list(cases.values())


def any_record(row: Row) -> Record:
    """Return any record of a case. All records of a case have the same labels."""
    return next(iter(row.values()))


def ratio(row: Row, candidate: str) -> float | None:
    """Return an implementation's time divided by the fused op's; None if either was not measured."""
    if candidate not in row or "fused" not in row:
        return None
    return row[candidate]["median_us"] / row["fused"]["median_us"]


def title(record: Record) -> str:
    return f"{record['op']} {record['pass']} {record['dtype']} {record['shape']}"


def inaccurate(records: Iterable[Record]) -> list[str]:
    """Describe the cases where the fused op is inaccurate.

    An op is inaccurate if its error exceeds the sum of twice eager's error and the rounding error of the input dtype.
    """
    found = []
    for row in rows(records):
        if "fused" not in row or "eager" not in row:
            continue
        error, of_eager = row["fused"]["max_error"], row["eager"]["max_error"]
        if error is None or of_eager is None:
            continue
        rounding = torch.finfo(getattr(torch, row["fused"]["dtype"].split(",")[0])).eps
        if error > 2 * of_eager + rounding:
            found.append(f"{title(row['fused'])}: error {error:.1e}, eager's {of_eager:.1e}")
    return found


def regressions(old: Result, new: Result) -> list[str]:
    """Describe the cases where the fused op has become slower.

    Times are compared as multiples of eager's time, or in microseconds if either run lacks eager. Implementations are
    timed alternately, so other load on the computer affects ours and eager equally. A case is reported if its time has
    grown by more than 5% plus the noise. The noise is the root of the sum of squares of the relative interquartile
    ranges of all times compared.

    Raises:
        ResultError: the two results have no fused case in common.
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
            longer = f"takes {now / then:.2f} times as long as before{unit}, noise up to {margin:.2f}"
            found.append(f"{title(row['fused'])}: {longer}")
    return found


def _case(record: Record) -> tuple[Any, ...]:
    return record["op"], record["pass"], record["dtype"], tuple(record["shape"])
