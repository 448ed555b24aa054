"""What the commands share: where they compute, and what they call a mistake in how they were called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Device = Literal["auto", "cpu", "cuda"]


class UsageError(ValueError):
    """A command cannot be carried out as it was given."""


PICTURE_FORMATS = ("png", "pdf", "svg")


def picture_format(path: Path, option: str = "path") -> str:
    """Return the format that the suffix of a picture's file names: "png", "pdf" or "svg".

    Args:
        path: the file.
        option: what the error calls it.

    Raises:
        UsageError: the suffix names another format, or there is none.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in PICTURE_FORMATS:
        raise UsageError(f"expected {option} to end in .{', .'.join(PICTURE_FORMATS)}, got {path}")
    return kind


def find_device(device: Device) -> torch.device:
    """The device of that name; `auto` is the GPU if there is one that the kernels were built for.

    Raises:
        UsageError: there is no such device.
    """
    import torch

    from wakesleep_ext import _build

    found, built = torch.cuda.is_available(), _build.CUDA_VERSION is not None
    if device == "cuda" and not found:
        raise UsageError("expected a GPU for --device cuda, torch finds none")
    if device == "cuda" and not built:
        raise UsageError("--device cuda: wakesleep_ext was built without CUDA")
    if device == "auto" and found and not built:
        print("wakesleep: a GPU is here, but wakesleep_ext was built without CUDA", file=sys.stderr)
    return torch.device("cuda" if device != "cpu" and found and built else "cpu")
