"""Checkpoints: tensors and their JSON description in one safetensors file.

One file, so that one rename replaces the whole: whoever reads the path finds the old checkpoint
or the new one, never a part of either. Nothing in it is code, so loading executes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from wakesleep_ext._files import FileError, write_atomically
from wakesleep_ext.helmholtz.models import HelmholtzMachine, ModelConfig

Config = TypeVar("Config")


class CheckpointError(FileError):
    """A checkpoint cannot be loaded; the message names the file and the reason."""


class Checkpoint(NamedTuple):
    tensors: dict[str, Tensor]
    """Tensors by name, on the CPU."""
    description: dict[str, Any]
    """The JSON object that was saved with them."""


def save(path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Save tensors and a JSON object atomically, with a SHA-256 over both."""
    import safetensors.torch

    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(description)
    metadata = {"description": text, "sha256": _digest(held, text)}
    write_atomically(path, safetensors.torch.save(held, metadata))


def load(path: Path) -> Checkpoint:
    """Load what :func:`save` has written.

    Raises:
        CheckpointError: the file is missing, truncated or altered, or no checkpoint.
    """
    import safetensors.torch

    try:
        content = path.read_bytes()  # opened once, or the tensors could be those of a later file than the description
        tensors = safetensors.torch.load(content)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(path, f"cannot be read: {error}") from error
    metadata = _metadata(content)
    text = metadata.get("description")
    if text is None or "sha256" not in metadata:
        raise CheckpointError(path, "is a safetensors file, but not a wakesleep checkpoint")
    if _digest(tensors, text) != metadata["sha256"]:
        raise CheckpointError(path, "is damaged: its content does not have the SHA-256 it states")
    return Checkpoint(tensors, json.loads(text))


def _metadata(content: bytes) -> dict[str, str]:
    """Of a file in the safetensors format: after eight bytes, the size of a header, comes that, a JSON object."""
    size = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + size]).get("__metadata__", {})
    return metadata


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    layout = {name: [str(t.dtype), list(t.shape)] for name, t in sorted(tensors.items())}
    digest = hashlib.sha256(json.dumps([text, layout]).encode())
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_machine(path: Path) -> tuple[HelmholtzMachine, dict[str, Any]]:
    """The machine of a training run, on the CPU, and the run's description.

    Raises:
        CheckpointError: as :func:`load`, or the weights do not fit the model described.
    """
    tensors, description = load(path)
    prefix = "machine."
    try:
        config = restore(ModelConfig, description["model"])
        with torch.device("meta"):  # weights come from the file: none are drawn or allocated
            machine = config.build()
        weights = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        machine.load_state_dict(weights, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(path, f"does not hold the model it describes: {error}") from error
    return machine, description


def restore(config: type[Config], description: Any) -> Config:
    """A dataclass from the JSON object that describes it, which has lists where it has tuples.

    Raises:
        TypeError, ValueError: it is not one of these.
    """
    from typeguard import TypeCheckError, check_type

    if not isinstance(description, Mapping):
        raise TypeError(f"expected an object that describes a {config.__name__}, got {description!r}")
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in description.items()}
    made = config(**values)
    for name, hint in get_type_hints(config).items():
        value = getattr(made, name)
        try:
            check_type(value, hint)
        except TypeCheckError as error:
            raise TypeError(f"{name}: {error}") from error
        if isinstance(value, bool) and hint is not bool:  # which is an int to Python
            raise TypeError(f"{name}: expected {hint}, got {value}")
    return made
