"""Time a training step with each alternative of its settings, in one process and in turns.

The alternatives are the largest small batch, the size of a chunk, early launches, the precision of matrix products and
the steps in a replay. An alternative that would change nothing at a size is left out. Each has its error compared with
float64. The result is written after each size, so that a run that is cut off leaves what it has measured.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from wakesleep_ext import _C
from wakesleep_ext.benchmark import result
from wakesleep_ext.benchmark.instruments import Call
from wakesleep_ext.benchmark.measure import Here, Implementation, Rotation, take
from wakesleep_ext.benchmark.step_report import NET
from wakesleep_ext.benchmark.step_suite import Inputs, StepCase
from wakesleep_ext.info import commit_of
from wakesleep_ext.training.config import Precision
from wakesleep_ext.training.trainer import Trainer

SIZES = ("20x1", "100x1", "100x5", "100x50", "1000x50")
"""Batch size and L of the default cases, the smallest first."""
MEASURED_ROWS, MEASURED_MIB = 256, 48
"""The settings of a GPU."""
MOST_ROWS_OF_REPLAYS = 1000
"""Steps of more rows take longer than the launch of a graph, so a replay of several of them is left out."""


class Settings(NamedTuple):
    """What an alternative sets; None is the measured value."""

    small_batch: int | None = None
    chunk_mib: int | None = None
    dependent_launch: int | None = None
    precision: Precision = "float32"
    steps: int = 1
    """Number of steps in a replay."""

    @contextmanager
    def active(self) -> Iterator[None]:
        of = {
            _C.set_small_batch: self.small_batch,
            _C.set_chunk_mib: self.chunk_mib,
            _C.set_dependent_launch: self.dependent_launch,
        }
        for choose, number in of.items():
            choose(number)
        try:
            yield
        finally:
            for choose in of:
                choose(None)


ALTERNATIVES: Mapping[str, Settings] = {
    "fused": Settings(),
    "no early launches": Settings(dependent_launch=0),
    "tf32": Settings(precision="tf32"),
    "bfloat16": Settings(precision="bfloat16"),
    **{f"{steps} steps in a replay": Settings(steps=steps) for steps in (4, 16)},
    **{f"small batches of {rows}": Settings(small_batch=rows) for rows in (0, 64, 128, 256, 512)},
    **{f"chunks of {mib} MiB": Settings(chunk_mib=mib) for mib in (8, 16, 32, 48, 64, 96)},
}


class AlternativeCase(StepCase):
    """A training step whose implementations differ in their settings."""

    @property
    def candidates(self) -> tuple[str, ...]:
        """Names of the alternatives. Of those with the same effect, only the first is named."""
        of_effects: dict[object, str] = {}
        for name, settings in ALTERNATIVES.items():
            of_effects.setdefault(self._effect(settings), name)
        return tuple(of_effects.values())

    def _effect(self, settings: Settings) -> object:
        """Return an object that is equal for two settings if their steps do not differ."""
        rows = self.batch, self.batch * self.num_samples
        limit = MEASURED_ROWS if settings.small_batch is None else settings.small_batch
        chunk = (MEASURED_MIB if settings.chunk_mib is None else settings.chunk_mib) * 2**20
        small = [count <= limit for count in rows]
        chunks = 1 if small[1] else math.ceil(rows[1] * self.net[0] * torch.float32.itemsize / chunk)
        precision = "float32" if all(small) and settings.precision == "tf32" else settings.precision  # not in our GEMMs
        steps = settings.steps if rows[1] <= MOST_ROWS_OF_REPLAYS else 1
        return *small, chunks, settings.dependent_launch, precision, steps

    def calls(self, candidate: str, inputs: Sequence[Inputs]) -> list[Call]:
        _, _, _, precision, steps = ALTERNATIVES[candidate]
        training = replace(self.training, precision=precision)
        trainers = [Trainer(self.machine(one.images), one.images, training) for one in inputs]
        batches = [one.batch if steps == 1 else one.batch.repeat(steps, 1) for one in inputs]
        return [partial(trainer.take_step, batch) for trainer, batch in zip(trainers, batches, strict=True)]

    def implementation(self, candidate: str, inputs: Sequence[Inputs], rotation: Rotation) -> Implementation:
        return Alternative(self.calls(candidate, inputs), rotation, ALTERNATIVES[candidate])

    def error(self, candidate: str, inputs: Inputs, result: Any) -> float | None:
        return super().error("fused", inputs, result if result.dim() == 1 else result[0])


class Alternative(Here):
    """An implementation that runs with settings. A CUDA graph keeps the settings that it was recorded with."""

    def __init__(self, calls: Sequence[Call], rotation: Rotation, settings: Settings) -> None:
        super().__init__(calls, rotation)
        self._settings = settings

    def first(self) -> object:
        with self._settings.active():
            return super().first()

    def seconds(self, count: int) -> float:
        """Return the seconds that this many steps take."""
        replays = math.ceil(count / self._settings.steps)
        with self._settings.active():
            return super().seconds(replays) * count / (replays * self._settings.steps)

    def launches(self) -> int | None:
        launches = super().launches()
        return None if launches is None else round(launches / self._settings.steps)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=SIZES, metavar="BATCHxL")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=30.0, help="time for all sizes, without preparations")
    parser.add_argument("--json", type=Path, metavar="PATH")
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device)
    cases = [AlternativeCase(NET, *map(int, size.split("x")), device.type) for size in chosen.sizes]
    blocks = int(chosen.seconds / len(cases) / AlternativeCase.block_seconds)
    words = sys.argv[1:] if arguments is None else arguments
    machine = result.machine(
        device, torch.get_num_threads(), shlex.join(["python", "scripts/gpu_alternatives.py", *words])
    )
    machine["commit"], machine["modified"] = commit_of(Path(__file__).resolve().parent.parent)  # built from here
    for bandwidth, records in take(cases, tuple(ALTERNATIVES), device, blocks, warnings.warn):
        figures: result.Result = {
            "suite": "step",
            "machine": machine,
            "copy_bandwidth_gbs": bandwidth,
            "records": records,
        }
        if chosen.json:
            result.write(chosen.json, figures)
        print(table(result.rows(records)[-1]), flush=True)


def table(row: result.Row) -> str:
    """Format the alternatives of a size, one per line."""
    samples, batch, _ = result.any_record(row)["shape"]
    lines = [f"{batch}x{samples}: µs, half the interquartile range, time over the first, kernels, error"]
    for name, record in row.items():
        times = f"{record['median_us']:10.1f} ±{record['iqr_us'] / 2:6.1f}{result.ratio(row, name):8.3f}"
        lines.append(f"  {name:22}{times}{record.get('launches') or '-':>6}  {record['max_error']:.0e}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
