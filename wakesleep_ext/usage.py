"""Choose the device and the threads, and check arguments, for all commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Device = Literal["auto", "cpu", "cuda"]

Threads = int | Literal["auto"]

Log = Literal["tensorboard"]
"""The loggers. Each is a module of :mod:`wakesleep_ext.report`."""


class UsageError(ValueError):
    """A command got invalid arguments."""


PICTURES = (".png", ".pdf", ".svg")
"""Suffixes of pictures."""


def check_output(path: Path, option: str, *suffixes: str) -> None:
    """Check that a file of this name can be written, before the command computes what goes in it.

    Raises:
        UsageError: the suffix is not one of `suffixes` (by default any, such as ".html"), or it cannot be written.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        raise UsageError(f"expected {option} to end in {', '.join(suffixes)}, got {path}")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise UsageError(f"expected {option} to name a file that can be written, got {path}")


def load_logger(log: Log) -> Any:
    """Return the `follow` function of a logger; see :mod:`wakesleep_ext.report.tensorboard`.

    Raises:
        UsageError: a package that the logger needs is not installed.
    """
    try:
        return import_module(f"wakesleep_ext.report.{log}").follow
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--log {log} needs the package {error.name}, which is not installed. Install it: pip install {error.name}"
        ) from error


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


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Run everything in this context on `count` CPU threads.

    Raises:
        UsageError: `count` is less than 1.
    """
    import torch

    if count < 1:
        raise UsageError(f"expected --threads of at least 1, got {count}")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
