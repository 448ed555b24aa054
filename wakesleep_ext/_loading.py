"""Load the compiled operators, or raise an error that says how to fix the installation."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from wakesleep_ext.info import reinstall_command


def load_kernels() -> None:
    """Import ``wakesleep_ext._C``, which registers ``torch.ops.wakesleep_ext.*``.

    Warns if torch can use a GPU but the kernels were built for the CPU only.

    Raises:
        ImportError: there is no compiled module, or it was built for another version of torch. The message says
            which of the two.
    """
    import torch

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
            f"Rebuild it for this torch: `{reinstall_command()}`."
        )
    try:
        importlib.import_module("wakesleep_ext._C")
    except ImportError as error:
        raise ImportError(
            f"the compiled kernels of wakesleep_ext, built for torch {_build.TORCH_VERSION}, do not load with "
            f"torch {torch.__version__}: {error}. Rebuild them: `{reinstall_command()}`."
        ) from error
    if _build.CUDA_VERSION is None and torch.version.cuda is not None and _sees_a_gpu(torch):
        warnings.warn(
            f"torch {torch.__version__} finds a GPU, but wakesleep_ext was built without CUDA kernels "
            f"({_build.REASON}). To build them, put the nvcc of a CUDA {torch.version.cuda} toolkit on the PATH, or "
            f"set CUDA_HOME, and run `{reinstall_command('WAKESLEEP_FORCE_CUDA=1')}`.",
            RuntimeWarning,
            stacklevel=3,  # the warning points at the import of wakesleep_ext
        )


def _sees_a_gpu(torch: Any) -> bool:
    """True if the driver's NVML library finds a GPU. NVML does not initialise CUDA, so the process can still fork."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns if NVML is not installed
            return bool(torch.cuda._device_count_nvml() > 0)
    except Exception:  # a failure of this check must not make the import fail
        return False


def _series(version: str) -> str:
    """Return the major and minor version of torch, within which binaries are compatible: '2.13.0+cpu' -> '2.13'."""
    return ".".join(version.split("+")[0].split(".")[:2])
