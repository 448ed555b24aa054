"""Choose the precision of large matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from wakesleep_ext.training.config import Precision


def check_precision(precision: Precision, device: torch.device) -> None:
    """Check that a device has a precision.

    Raises:
        ValueError: the precision is TF32, but the device is not a GPU.
    """
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f'Step: expected precision "float32" on {device}, got "tf32", which only a GPU has')


@contextmanager
def matrix_products(precision: Precision) -> Iterator[None]:
    """Let the BLAS of a GPU multiply float32 matrices in a precision while the context is active."""
    if precision == "float32":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
