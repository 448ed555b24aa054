"""Describe a run: its data, model and training options, in a form that JSON can hold."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from wakesleep_ext._files import FileError
from wakesleep_ext.helmholtz.config import ModelConfig
from wakesleep_ext.helmholtz.models import HelmholtzMachine
from wakesleep_ext.training import checkpoint
from wakesleep_ext.training.config import DIGITS, RunOptions, TrainConfig
from wakesleep_ext.training.data import Dataset, load


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
    train_array: str = RunOptions.train_array
    """Name of the array of training images, if the data are an .npz file."""
    test_array: str = RunOptions.test_array
    """Name of the array of test images, if the data are an .npz file."""

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

    def machine(self, dataset: Dataset) -> HelmholtzMachine:
        """Build the machine of a new run, on the CPU, with initial weights drawn from the seed in the config."""
        torch.manual_seed(self.training.seed)
        return HelmholtzMachine.from_config(self.model, dataset.train.mean())

    def load_data(self, folder: Path, source: str) -> Dataset:
        """Load data whose images have the shape of this run, which is in a folder.

        Raises:
            FileError: the data cannot be read, or their images have a different shape.
        """
        dataset = load(source, train_array=self.train_array, test_array=self.test_array)
        if dataset.test.shape != self.image_shape:
            raise RunError(
                folder,
                f"was trained on images of shape {list(self.image_shape)}, "
                f"but the images of {dataset.name} have shape {list(dataset.test.shape)}",
            )
        return dataset

    def with_data(self, folder: Path, source: str | None) -> tuple[RunConfig, Dataset]:
        """Load the data of this run, which is in a folder. Return the config, which names their place, and the data.

        Args:
            source: where the data are now, if they have moved.

        Raises:
            FileError: the data cannot be read, or are not those of the run.
        """
        config = self if source is None else replace(self, data=os.path.abspath(source))
        dataset = config.load_data(folder, config.data)
        if dataset.sha256() != config.data_sha256:
            raise RunError(folder, f"the images in {config.data} differ from those that this run began with")
        return config, dataset

    @classmethod
    def restore(cls, description: dict[str, Any]) -> RunConfig:
        """Restore a config from the JSON form of :func:`dataclasses.asdict`.

        Raises:
            TypeError, ValueError: the object is not a valid config.
        """
        parts: dict[str, type[Any]] = {"model": ModelConfig, "training": TrainConfig}
        restored = {name: checkpoint.restore(part, description.get(name)) for name, part in parts.items()}
        return checkpoint.restore(cls, description | restored)


def of_checkpoint(path: Path, held: checkpoint.Checkpoint) -> tuple[RunConfig, int]:
    """Return the config and the number of completed steps that a checkpoint stores.

    Raises:
        CheckpointError: it does not store them.
    """
    description = {name: value for name, value in held.description.items() if name not in ("seconds", "made_with")}
    try:
        step = description.pop("step")
        if type(step) is not int or step < 0:
            raise ValueError(f"expected step to be a number of steps, got {step!r}")
        return RunConfig.restore(description), step
    except (KeyError, TypeError, ValueError) as error:
        raise checkpoint.CheckpointError(path, f"does not describe the run: {error}") from error


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
