"""Loads the compiled operators, and says what to do where that fails."""

from __future__ import annotations

import importlib


def load_kernels() -> None:
    """Imports ``wakesleep_ext._C``, which registers ``torch.ops.wakesleep_ext.*``.

    Raises:
        ImportError: naming the cause: no compiled module, or one that was built for another torch.
    """
    import torch

    reinstall = "pip install --force-reinstall --no-deps --no-cache-dir wakesleep_ext"
    try:
        from wakesleep_ext import _build
    except ImportError as error:
        raise ImportError(
            "wakesleep_ext has no compiled kernels: this looks like a source tree that was never built. "
            "Install it with `pip install .`, or build it in place with "
            "`pip install -e . --no-build-isolation`."
        ) from error
    if _series(_build.TORCH_VERSION) != _series(torch.__version__):
        raise ImportError(
            f"wakesleep_ext was built for torch {_build.TORCH_VERSION}, found torch {torch.__version__}. "
            f"Rebuild it for this torch: `{reinstall}`."
        )
    try:
        importlib.import_module("wakesleep_ext._C")
    except ImportError as error:
        raise ImportError(
            f"the compiled kernels of wakesleep_ext, built for torch {_build.TORCH_VERSION}, do not load beside "
            f"torch {torch.__version__}: {error}. Rebuild them: `{reinstall}`."
        ) from error


def _series(version: str) -> str:
    """The part of a torch version within which binaries keep working: '2.13.0+cpu' -> '2.13'."""
    return ".".join(version.split("+")[0].split(".")[:2])
