"""Shared by the commands: the choice of a device, and the error for invalid arguments."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Device = Literal["auto", "cpu", "cuda"]


class UsageError(ValueError):
    """A command has invalid arguments."""


PICTURE_FORMATS = ("png", "pdf", "svg")


def picture_format(path: Path, option: str = "path") -> str:
    """Return the format of a picture from the suffix of its file: "png", "pdf" or "svg".

    Args:
        path: the file.
        option: name of the argument in the error.

    Raises:
        UsageError: the file has another suffix or none.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in PICTURE_FORMATS:
        raise UsageError(f"expected {option} to end in .{', .'.join(PICTURE_FORMATS)}, got {path}")
    return kind


def find_device(device: Device) -> torch.device:
    """Return the device of that name. `auto` is the GPU if torch finds one and the kernels were built with CUDA.

    Raises:
        UsageError: `cuda` was asked for, but there is no GPU, or the kernels were built without CUDA.
    """
    import torch

    from wakesleep_ext import _build

    found, built = torch.cuda.is_available(), _build.CUDA_VERSION is not None
    if device == "cuda" and not found:
        raise UsageError("expected a GPU for --device cuda, torch finds none")
    if device == "cuda" and not built:
        raise UsageError("--device cuda: wakesleep_ext was built without CUDA")
    if device == "auto" and found and not built:
        print("wakesleep: torch finds a GPU, but wakesleep_ext was built without CUDA", file=sys.stderr)
    return torch.device("cuda" if device != "cpu" and found and built else "cpu")
