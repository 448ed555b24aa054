"""Read the records of whole steps: sections, goals and notes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from wakesleep_ext.benchmark.result import Record, Result, Row, any_record, ratio, rows
from wakesleep_ext.benchmark.suite import NONE, TIMES, Outcome, Section

_Narrow: TypeAlias = "dict[tuple[int, int], Row]"

NET = (784, 200, 200, 50)
"""Widths of the narrow network from x to z. The goals are for this network."""

BASELINES = (
    "jax",
    "eager",
    "distributions",
    "compiled step",
    "max-autotune",
    "eager in a graph",
    "compiled in a graph",
    "compile",
    "compile with graphs",
)
"""Every baseline. The last two compile only the losses; results of version 0.1.0 contain them."""

BURDA_STEPS = 9_840_000
"""Number of steps in the protocol of Burda, Grosse & Salakhutdinov ("Importance weighted autoencoders", ICLR 2016).
The batch size is 20, L = 1, and training makes 3,280 passes over 60,000 images."""

_SLOWEST_JAX = 1.25
"""On a CPU, the minimum speed compared with JAX, except at the sizes below."""
_SLOWEST_JAX_AT = {(100, 1): 1.1}
_OVER_PRODUCTS = {"batch 20, L = 1": ([(20, 1)], 1.5), "batch 100": ([(100, 1), (100, 5), (100, 50)], 1.25)}
"""On a CPU, the maximum ratio of a step's time to the time of its GEMMs alone, and the sizes that it applies to."""

_SMALL_BATCH = 100
_IN_A_GRAPH = ("eager in a graph", "compiled in a graph")
_SPEED_IN_A_GRAPH = 2
"""On a GPU, the minimum speed compared with the baselines in a graph, for batches of up to 100."""
_MOST_KERNELS = 26
"""Maximum number of kernels in a step with batch size 20 and L = 1."""
_PROTOCOL_MINUTES = 10


def sections(records: Iterable[Record]) -> list[Section]:
    """Group the cases by network."""
    nets: dict[str, list[Row]] = {}
    for row in rows(records):
        nets.setdefault(any_record(row)["op"], []).append(row)
    return [(f"A step of {net}:", part) for net, part in nets.items()]


def outcomes(result: Result) -> list[Outcome]:
    """Check the goals for the device."""
    every = rows(result["records"])
    return _on_a_gpu(every) if result["machine"]["device"] == "cuda" else _on_a_cpu(every)


def _on_a_cpu(every: list[Row]) -> list[Outcome]:
    narrow = _narrow(every)
    apart = [narrow[size] for size in _SLOWEST_JAX_AT if size in narrow]
    found = [_speed("jax", [row for row in every if row not in apart], _SLOWEST_JAX, "other sizes")]
    for (batch, num_samples), wanted in _SLOWEST_JAX_AT.items():
        here = [narrow[batch, num_samples]] if (batch, num_samples) in narrow else []
        found.append(_speed("jax", here, wanted, f"batch {batch}, L = {num_samples}"))
    found += [_speed(baseline, every, 1, "every size") for baseline in _measured(every) if baseline != "jax"]
    for where, (sizes, wanted) in _OVER_PRODUCTS.items():
        here = [narrow[size] for size in sizes if size in narrow]
        ratios = [measured for row in here if (measured := over_products(row)) is not None]
        found.append(_outcome(f"time over its products, {where}", max(ratios, default=None), TIMES, at_most=wanted))
    return found


def _on_a_gpu(every: list[Row]) -> list[Outcome]:
    small = [row for row in every if any_record(row)["shape"][1] <= _SMALL_BATCH]
    found = [_speed(baseline, small, _SPEED_IN_A_GRAPH, f"batches up to {_SMALL_BATCH}") for baseline in _IN_A_GRAPH]
    found += [_speed(baseline, every, 1, "every size") for baseline in _measured(every)]
    fused = _narrow(every).get((20, 1), {}).get("fused")
    kernels, minutes = (fused.get("launches"), fused["median_us"] * BURDA_STEPS / 60e6) if fused else (None, None)
    found.append(_outcome("kernels of a step, batch 20, L = 1", kernels, "", at_most=_MOST_KERNELS))
    found.append(_outcome("the whole of Burda's protocol", minutes, " min", at_most=_PROTOCOL_MINUTES))
    return found


def _measured(every: Iterable[Row]) -> list[str]:
    """Return the baselines that were measured."""
    return [baseline for baseline in BASELINES if any(baseline in row for row in every)]


def _speed(baseline: str, cases: Iterable[Row], at_least: float, where: str) -> Outcome:
    ratios = [found for row in cases if (found := ratio(row, baseline)) is not None]
    return _outcome(f"speed compared with {baseline}, {where}", min(ratios, default=None), TIMES, at_least=at_least)


def _outcome(what: str, measured: float | None, unit: str, *, at_least: float = 0, at_most: float = 0) -> Outcome:
    digits = 2 if unit == TIMES else 0
    cells = {
        "what": what,
        "measured": NONE if measured is None else f"{measured:.{digits}f}{unit}",
        "goal": f"≥ {at_least:g}{unit}" if at_least else f"≤ {at_most:g}{unit}",
    }
    return Outcome(cells, None if measured is None else measured >= at_least if at_least else measured <= at_most)


def notes(cases: Sequence[Row]) -> list[str]:
    """Say how long each implementation would take for the whole protocol of Burda et al."""
    row = _narrow(cases).get((20, 1))
    if row is None:
        return []
    times = [f"{name} {_duration(1e-6 * BURDA_STEPS * record['median_us'])}" for name, record in row.items()]
    protocol = f"the whole of Burda's protocol, {BURDA_STEPS / 1e6:.2f} million steps of batch 20 with L = 1"
    return [f"At this rate {protocol}, takes: {', '.join(times)}."]


def _narrow(cases: Iterable[Row]) -> _Narrow:
    """Return the cases of the narrow network, by batch size and L."""
    net = "-".join(map(str, NET))
    of_net = [(record["shape"], row) for row in cases if (record := any_record(row))["op"] == net]
    return {(batch, num_samples): row for (num_samples, batch, _), row in of_net}


def over_products(row: Row) -> float | None:
    """Return our step time divided by the time of the GEMMs alone."""
    found = ratio(row, "products")
    return None if found is None else 1 / found


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
