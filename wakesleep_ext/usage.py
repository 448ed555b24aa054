"""Choose the device and check arguments, for all commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Device = Literal["auto", "cpu", "cuda"]


class UsageError(ValueError):
    """A command got invalid arguments."""


PICTURE_FORMATS = ("png", "pdf", "svg")


def picture_format(path: Path, option: str = "path") -> str:
    """Return the format of a picture, "png", "pdf" or "svg", from the suffix of its path.

    Args:
        path: path of the picture.
        option: name of the argument, for the error message.

    Raises:
        UsageError: the path has another suffix, or none.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in PICTURE_FORMATS:
        raise UsageError(f"expected {option} to end in .{', .'.join(PICTURE_FORMATS)}, got {path}")
    return kind


def find_device(device: Device) -> torch.device:
    """Return the torch device. `auto` is the GPU if torch finds one and the kernels were built with CUDA, else the CPU.

    Raises:
        UsageError: `device` is "cuda", but there is no GPU, or the kernels were built without CUDA.
    """
    import torch

    from wakesleep_ext import _build

    found, built = torch.cuda.is_available(), _build.CUDA_VERSION is not None
    if device == "cuda" and not found:
        raise UsageError("expected a GPU for --device cuda, but torch finds none")
    if device == "cuda" and not built:
        raise UsageError("expected CUDA kernels for --device cuda, but wakesleep_ext was built without CUDA")
    if device == "auto" and found and not built:
        print("wakesleep: using the CPU: torch finds a GPU, but wakesleep_ext was built without CUDA", file=sys.stderr)
    return torch.device("cuda" if device != "cpu" and found and built else "cpu")
