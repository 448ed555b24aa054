"""Compute, read and write what a run measures: the metrics of each epoch, and the final evaluation.

`metrics.jsonl` contains one JSON object per line and epoch, and `evaluation.json` one object.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wakesleep_ext._files import strict_json, write_atomically
from wakesleep_ext.evaluation.bounds import log_likelihood_bounds
from wakesleep_ext.helmholtz.models import HelmholtzMachine
from wakesleep_ext.training.ranks import Ranks
from wakesleep_ext.training.run_config import RunError

METRICS, EVALUATION = FILES = ("metrics.jsonl", "evaluation.json")

_CHUNK_ROWS = 2000


def test_elbo(machine: HelmholtzMachine, test: Tensor, ranks: Ranks) -> float:
    """Return the mean ELBO of test images, which the ranks share.

    Args:
        test: binary pixels `[N, D]`, the same on all ranks. Each chunk of 2,000 images is divided.
    """
    total = torch.zeros((), dtype=torch.float64)
    for seed, images in enumerate(test.tensor_split(-(-len(test) // _CHUNK_ROWS))):
        with ranks.draws(len(images)):
            own = images[ranks.rows(len(images))]
            total += log_likelihood_bounds(machine.recognition, machine.generative, own, 1, seed=seed).elbo.sum()
    return ranks.sum([total])[0].item() / len(test)


def append(folder: Path, record: Mapping[str, Any]) -> None:
    """Append the record of an epoch."""
    with (folder / METRICS).open("a") as metrics:
        metrics.write(strict_json(record) + "\n")


def rewind(folder: Path, step: int, is_writer: bool = True) -> list[dict[str, Any]]:
    """Return the records up to a step, and delete later ones unless another process does this."""
    records = [record for record in read(folder) if record["step"] <= step]
    if is_writer:
        write_atomically(folder / METRICS, "".join(f"{strict_json(record)}\n" for record in records).encode())
    return records


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run, one record per epoch.

    An incomplete last line is skipped. A process leaves such a line if it ends while writing, for example because the
    disk is full.

    Raises:
        RunError: any other line is invalid.
    """
    return [record for record in _records(folder / METRICS) if "epoch" in record]


def write_evaluation(folder: Path, result: Mapping[str, Any]) -> None:
    """Write the final evaluation of a run."""
    write_atomically(folder / EVALUATION, strict_json(result, indent=2).encode() + b"\n")


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """Return the final evaluation of a run, or None if the run has not ended.

    Raises:
        RunError: the file cannot be read.
    """
    path = folder / EVALUATION
    try:
        if path.exists():
            return dict(json.loads(path.read_bytes()))
    except (OSError, TypeError, ValueError) as error:
        raise RunError(path, f"cannot be read as a JSON object: {error}") from error
    old = [record for record in _records(folder / METRICS) if "nll" in record]  # written before its release as 0.2.0
    return old[-1] if old else None


def _records(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise ValueError(f"step is {record['step']!r}")
            if "nll" not in record and not isinstance(record["epoch"] * record["test_elbo"], float):
                raise ValueError(f"epoch is {record['epoch']!r}, and test_elbo is {record['test_elbo']!r}")
        except (KeyError, TypeError, ValueError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise RunError(path, f"line {number} is not a valid record: {error!r}") from error
        records.append(record)
    return records
