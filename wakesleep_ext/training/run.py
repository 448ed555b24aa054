"""Read and write the folder of a run. Only this module knows the files in the folder, their formats and the lock.

`config.json` describes the run. `checkpoint.safetensors` contains weights, optimizer state, the same description, and
the step number. `metrics.jsonl` contains one JSON object per epoch, and a last object with the final evaluation.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wakesleep_ext._files import locked, write_atomically
from wakesleep_ext.evaluation.bounds import log_likelihood_bounds
from wakesleep_ext.helmholtz.models import HelmholtzMachine
from wakesleep_ext.training import checkpoint
from wakesleep_ext.training.data import Dataset, load
from wakesleep_ext.training.run_config import RunConfig, RunError
from wakesleep_ext.training.trainer import DivergedError, Trainer

_CHECKPOINT = "checkpoint.safetensors"
_CONFIG = "config.json"
_METRICS = "metrics.jsonl"
_PICTURES = ("samples", "reconstructions", "curves", "evaluation")
_FILES = (_CHECKPOINT, _CONFIG, _METRICS, *(f"{name}.png" for name in _PICTURES))

_SECONDS_BETWEEN_SAVES = 10.0


class Run:
    """The folder of one run."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder, self.config = folder, config

    @classmethod
    @contextmanager
    def begin(cls, folder: Path, config: RunConfig, overwrite: bool = False) -> Iterator[Run]:
        """Start a new run, and lock its folder for this process until the context ends.

        Args:
            overwrite: replace an existing run in the folder.

        Raises:
            RunError: the folder already holds a run, or another process is writing to it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            held = [name for name in _FILES if (folder / name).exists()]
            if held and not overwrite:
                raise RunError(
                    folder, f"already holds a run ({', '.join(held)}); choose another folder, or overwrite it"
                )
            for name in held:
                (folder / name).unlink()
            write_atomically(folder / _CONFIG, json.dumps(asdict(config), indent=2).encode() + b"\n")
            yield cls(folder, config)

    @classmethod
    @contextmanager
    def resume(cls, folder: Path, device: torch.device) -> Iterator[tuple[Run, Trainer, Dataset]]:
        """Resume an interrupted run. Yield the run, its trainer in the state of the last checkpoint, and its data.

        Raises:
            FileError: the checkpoint or the data cannot be read, the data have changed, or another process is writing
                to the folder.
        """
        path = folder / _CHECKPOINT
        with locked(folder):
            held = checkpoint.load(path)  # read once, under the lock, so that the run cannot be replaced
            run, machine, step = cls._restore(folder, held)
            dataset = load(run.config.data)
            if dataset.sha256() != run.config.data_sha256:
                raise RunError(folder, f"the images in {run.config.data} have changed since this run began")
            trainer = Trainer(machine.to(device), dataset.train.to(device), run.config.training)
            try:
                trainer.load_state_dict(held.tensors)
            except (KeyError, RuntimeError) as error:
                raise checkpoint.CheckpointError(path, f"does not hold the state of a trainer: {error!r}") from error
            trainer.step = step
            yield run, trainer, dataset

    @classmethod
    def load(cls, folder: Path) -> tuple[Run, HelmholtzMachine]:
        """Load a run and its machine from the last checkpoint, on the CPU.

        Raises:
            CheckpointError: there is no checkpoint, or it is damaged.
        """
        run, machine, _ = cls._restore(folder, checkpoint.load(folder / _CHECKPOINT))
        return run, machine

    @classmethod
    def _restore(cls, folder: Path, held: checkpoint.Checkpoint) -> tuple[Run, HelmholtzMachine, int]:
        """Restore a run and its machine on the CPU. Return both, and the number of completed steps."""
        path = folder / _CHECKPOINT
        machine, description = checkpoint.machine_of(path, held), dict(held.description)
        try:
            step = description.pop("step")
            if type(step) is not int or step < 0:
                raise ValueError(f"expected step to be a number of steps, got {step!r}")
            config = RunConfig.restore(description)
        except (KeyError, TypeError, ValueError) as error:
            raise checkpoint.CheckpointError(path, f"does not describe the run: {error}") from error
        return cls(folder, config), machine, step

    def load_data(self, source: str | None = None) -> Dataset:
        """Load the training data of the run, or other data of the same shape.

        Raises:
            FileError: the data cannot be read, or their images have a different shape.
        """
        dataset = load(source or self.config.data)
        if dataset.test.shape != self.config.image_shape:
            raise RunError(
                self.folder,
                f"was trained on images of shape {list(self.config.image_shape)}, "
                f"but the images of {dataset.name} have shape {list(dataset.test.shape)}",
            )
        return dataset

    def picture(self, name: str) -> Path:
        """Return the path of a picture of the run."""
        assert name in _PICTURES
        return self.folder / f"{name}.png"

    def train(self, trainer: Trainer, test: Tensor, on_step: Callable[[], object]) -> Iterator[dict[str, float]]:
        """Train until the last epoch, and write metrics and checkpoints to the folder.

        Args:
            test: binary pixels `[N, D]`, uint8, on the trainer's device.
            on_step: called after each step.

        Yields:
            The metrics of each epoch. A resumed run first yields the metrics of the epochs before its checkpoint.

        Raises:
            DivergedError: as in :meth:`Trainer.epochs`; the message names the last good checkpoint.
        """
        saved_step, saved_at = self._save(trainer), time.monotonic()
        noted = read_metrics(self.folder)
        records = [record for record in noted if "epoch" in record and record["step"] <= trainer.step]
        write_atomically(self.folder / _METRICS, "".join(f"{json.dumps(record)}\n" for record in records).encode())
        yield from records
        machine = trainer.machine
        try:
            for epoch in trainer.epochs(on_step):
                elbo = log_likelihood_bounds(machine.recognition, machine.generative, test, 1).elbo.mean().item()
                progress = {"epoch": epoch.epoch, "step": epoch.step, "seconds": epoch.seconds}
                losses = {f"{name}_loss": loss for name, loss in epoch.losses.items()}
                record = progress | losses | {"test_elbo": elbo}
                self.note(record)
                if time.monotonic() > saved_at + _SECONDS_BETWEEN_SAVES:
                    saved_step, saved_at = self._save(trainer), time.monotonic()
                yield record
        except DivergedError as error:
            raise DivergedError(
                f"{error}; the last good checkpoint, of step {saved_step}, is {self.folder / _CHECKPOINT}"
            ) from error
        self._save(trainer)

    def note(self, record: dict[str, Any]) -> None:
        """Append a record to the metrics file."""
        with (self.folder / _METRICS).open("a") as metrics:
            metrics.write(json.dumps(record) + "\n")

    def _save(self, trainer: Trainer) -> int:
        checkpoint.save(self.folder / _CHECKPOINT, trainer.state_dict(), asdict(self.config) | {"step": trainer.step})
        return trainer.step


def has_begun(folder: Path) -> bool:
    """Return True if a folder contains a run that can be resumed."""
    return (folder / _CHECKPOINT).exists()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run: one record per epoch, and the final evaluation if it exists.

    An incomplete last line is skipped. A process leaves such a line if it ends while writing, for example because the
    disk is full.

    Raises:
        RunError: any other line is invalid.
    """
    path = folder / _METRICS
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise ValueError(f"step is {record['step']!r}")
        except (KeyError, TypeError, ValueError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise RunError(path, f"line {number} is not a valid record: {error!r}") from error
        records.append(record)
    return records
