"""Read and write the folder of a run. Only this module knows the files in the folder, their formats and the lock.

`config.json` describes the run. `checkpoint.safetensors` contains weights, optimizer state, the same description, and
the step number. `metrics.jsonl` contains one JSON object per epoch, and a last object with the final evaluation.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wakesleep_ext._files import FileError, locked, write_atomically
from wakesleep_ext.evaluation.bounds import log_likelihood_bounds
from wakesleep_ext.helmholtz.config import ModelConfig
from wakesleep_ext.helmholtz.models import HelmholtzMachine
from wakesleep_ext.training import checkpoint
from wakesleep_ext.training.config import DIGITS, RunOptions, TrainConfig
from wakesleep_ext.training.data import Dataset, load
from wakesleep_ext.training.trainer import DivergedError, Trainer

_CHECKPOINT = "checkpoint.safetensors"
_CONFIG = "config.json"
_METRICS = "metrics.jsonl"
_PICTURES = ("samples", "reconstructions", "curves", "evaluation")
_FILES = (_CHECKPOINT, _CONFIG, _METRICS, *(f"{name}.png" for name in _PICTURES))

_SECONDS_BETWEEN_SAVES = 10.0


class RunError(FileError):
    """A run cannot be started or resumed; the message names the folder or file, and the reason."""


@dataclass(frozen=True)
class RunConfig:
    """Contains all options that determine a run.

    Raises:
        ValueError: a value is out of range.
    """

    data: str
    """The argument of :func:`wakesleep_ext.training.data.load`."""
    data_sha256: str
    """SHA-256 digest of the images."""
    image_shape: tuple[int, int]
    """Height and width of an image."""
    model: ModelConfig
    training: TrainConfig
    bound_samples: int
    """Samples per test image for the log-likelihood bound at the end."""

    def __post_init__(self) -> None:
        if self.bound_samples < 1:
            raise ValueError(f"expected bound_samples of at least 1, got {self.bound_samples}")

    @classmethod
    def of(cls, description: Mapping[str, Any], dataset: Dataset) -> RunConfig:
        """Create a config from a description and the data set.

        Args:
            description: a complete or partial config in the form of :func:`dataclasses.asdict`. Missing options get
                their default values.
            dataset: the data set that `data` in the description names.

        Raises:
            TypeError, ValueError: a value is invalid, `data_sha256` does not match the data set, or there are fewer
                than two test images.
        """
        if len(dataset.test) < 2:
            raise ValueError(f"expected at least two test images, got {len(dataset.test)}")
        facts = {"data_sha256": dataset.sha256(), "image_shape": dataset.train.shape}
        if description.get("data_sha256", facts["data_sha256"]) != facts["data_sha256"]:
            raise ValueError(
                f"expected the images that data_sha256 identifies, but {description['data']} contains other images"
            )
        model = {**description.get("model", {}), "observed": dataset.train.grey.shape[1]}
        parts = {"model": model, "training": description.get("training", {})}
        return cls.restore(asdict(RunOptions()) | dict(description) | facts | parts)

    def start(self, dataset: Dataset, device: torch.device) -> Trainer:
        """Create the trainer of a new run, with initial weights drawn from the seed in the config.

        Raises:
            ValueError: the objective does not support the model's latent variables.
        """
        torch.manual_seed(self.training.seed)
        machine = HelmholtzMachine.from_config(self.model, dataset.train.mean())
        return Trainer(machine.to(device), dataset.train.to(device), self.training)

    @classmethod
    def restore(cls, description: dict[str, Any]) -> RunConfig:
        """Restore a config from the JSON form of :func:`dataclasses.asdict`.

        Raises:
            TypeError, ValueError: the object is not a valid config.
        """
        parts: dict[str, type[Any]] = {"model": ModelConfig, "training": TrainConfig}
        restored = {name: checkpoint.restore(part, description.get(name)) for name, part in parts.items()}
        return checkpoint.restore(cls, description | restored)


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


def read_config(path: Path) -> dict[str, Any]:
    """Read a complete or partial description of a run, such as the `config.json` of a run folder.

    Raises:
        RunError: the file cannot be read, is not a JSON object, or has an unknown key; or `data` or `bound_samples` has
            the wrong type.
    """
    try:
        described = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(path, f"cannot be read as JSON: {error}") from error
    for part, of in ((None, RunConfig), ("model", ModelConfig), ("training", TrainConfig)):
        values, where = (described, "") if part is None else (described.get(part, {}), f"{part}.")
        if not isinstance(values, dict):
            raise RunError(path, f"expected {part or 'the file'} to be a JSON object, got {values!r}")
        if unknown := values.keys() - {field.name for field in fields(of)}:
            raise RunError(path, f"has unknown keys: {', '.join(where + name for name in sorted(unknown))}")
    try:
        checkpoint.check_types(RunOptions, described)
    except TypeError as error:
        raise RunError(path, str(error)) from error
    return described


def overlaid(base: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return a description with the chosen values. Others come from the base or, if it lacks them, the defaults."""
    parts = {part: {**base.get(part, {}), **chosen.get(part, {})} for part in ("model", "training")}
    described = asdict(RunOptions()) | dict(base) | dict(chosen) | parts
    if "data" in chosen:
        described.pop("data_sha256", None)  # the digest describes the base's data
    if described["data"] != DIGITS:
        described["data"] = os.path.abspath(described["data"])
    return described


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
