"""Save checkpoints: tensors and their JSON description in one safetensors file.

A new checkpoint replaces the old one by a single rename, so readers find the old file or the new one, never a partial
file. The file contains no code, so loading it executes none.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from wakesleep_ext._files import FileError, write_atomically
from wakesleep_ext.helmholtz.config import ModelConfig
from wakesleep_ext.helmholtz.models import HelmholtzMachine

FORMAT = 2
"""Version of the format of a checkpoint. Version 1, of 0.2.0 before its release, stored no version."""

Config = TypeVar("Config")

_log = logging.getLogger(__name__)


class CheckpointError(FileError):
    """A checkpoint cannot be loaded; the message names the file and the reason."""


class NewerFormatError(CheckpointError):
    """A checkpoint was written by a later version of this package."""


class Checkpoint(NamedTuple):
    tensors: dict[str, Tensor]
    """Tensors by name, on the CPU."""
    description: dict[str, Any]
    """The JSON object that was saved with the tensors."""


def save(path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Save tensors and a JSON object atomically, with a SHA-256 digest of both."""
    import safetensors.torch

    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(description)
    metadata = {"description": text, "format": str(FORMAT), "sha256": _digest(held, text, str(FORMAT))}
    write_atomically(path, safetensors.torch.save(held, metadata))


def load(path: Path) -> Checkpoint:
    """Load a checkpoint that :func:`save` has written.

    Raises:
        CheckpointError: the file is missing, truncated, altered, not a checkpoint, or in the format of a later version.
    """
    import safetensors.torch

    try:
        content = path.read_bytes()  # read once: tensors and description must be from the same file
        tensors = safetensors.torch.load(content)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(path, f"cannot be read: {error}") from error
    metadata = _metadata(content)
    text = metadata.get("description")
    if text is None or "sha256" not in metadata:
        raise CheckpointError(path, "is a safetensors file, but not a wakesleep checkpoint")
    written = metadata.get("format", "1")
    if _digest(tensors, text, written) != metadata["sha256"]:
        raise CheckpointError(path, "is damaged: the SHA-256 of its content differs from the stored digest")
    if int(written) > FORMAT:
        raise NewerFormatError(path, f"expected a format up to {FORMAT}, got {written}; update wakesleep_ext")
    return Checkpoint(tensors, json.loads(text))


def load_first(paths: Sequence[Path]) -> tuple[Path, Checkpoint]:
    """Load the first checkpoint that is intact, and log a warning if that is not the first of all.

    Returns:
        The path of the loaded checkpoint, and the checkpoint.

    Raises:
        CheckpointError: none can be loaded; the message gives the reason for each existing file.
    """
    errors: list[CheckpointError] = []
    for path in paths:
        try:
            held = load(path)
        except NewerFormatError:
            raise
        except CheckpointError as error:
            if not errors or path.exists():
                errors.append(error)
            continue
        if errors:
            _log.warning("%s. Continuing from the checkpoint before it, %s", "; ".join(map(str, errors)), path)
        return path, held
    raise CheckpointError(paths[0], "; ".join(str(error).removeprefix(f"{paths[0]}: ") for error in errors))


def _metadata(content: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file: eight bytes of header size, then the header, a JSON object."""
    size = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + size]).get("__metadata__", {})
    return metadata


def _digest(tensors: Mapping[str, Tensor], text: str, written: str) -> str:
    layout = {name: [str(t.dtype), list(t.shape)] for name, t in sorted(tensors.items())}
    digest = hashlib.sha256(json.dumps([text, layout] + [written] * (written != "1")).encode())
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def machine_of(path: Path, held: Checkpoint) -> HelmholtzMachine:
    """Build the Helmholtz machine that a checkpoint contains, on the CPU.

    Raises:
        CheckpointError: the weights do not fit the described model.
    """
    tensors, description = held
    prefix = "machine."
    try:
        config = restore(ModelConfig, description["model"])
        with torch.device("meta"):  # the file supplies the weights, so do not allocate or draw any
            machine = HelmholtzMachine.from_config(config)
        weights = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        machine.load_state_dict(weights, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(path, f"does not hold the model it describes: {error}") from error
    return machine


def restore(config: type[Config], description: Any) -> Config:
    """Build a dataclass from the JSON object that describes it. Lists are converted to tuples.

    Raises:
        TypeError, ValueError: the object does not describe this dataclass.
    """
    if not isinstance(description, Mapping):
        raise TypeError(f"expected an object that describes a {config.__name__}, got {description!r}")
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in description.items()}
    try:
        made = config(**values)
    except TypeError:
        check_types(config, values)  # raises an error that names the value of the wrong type
        raise
    check_types(config, vars(made))
    return made


def check_types(config: type[Config], values: Mapping[str, Any]) -> None:
    """Check that each value has the type of the dataclass field with the same name.

    Raises:
        TypeError: a value has the wrong type; the message names its field.
    """
    from typeguard import TypeCheckError, check_type

    for name, hint in get_type_hints(config).items():
        value = values.get(name)
        try:
            if name in values:
                check_type(value, hint)
        except TypeCheckError as error:
            raise TypeError(f"{name}: {error}") from error
        if isinstance(value, bool) and hint is not bool:  # in Python, bool is a subclass of int
            raise TypeError(f"{name}: expected {hint}, got {value}")
