"""Choose the precision in which a training step multiplies matrices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from wakesleep_ext.training.config import Precision


def check_precision(precision: Precision, dtype: torch.dtype, device: torch.device) -> None:
    """Check that parameters of a dtype on a device can be multiplied in a precision.

    Raises:
        ValueError: the precision is TF32, but the device is not a GPU; or it is lower than float32, but the parameters
            are not in float32.
    """
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(
            f'Step: expected precision "float32" or "bfloat16" on {device}, got "tf32", which only a GPU has'
        )
    if precision != "float32" and dtype != torch.float32:
        raise ValueError(f'Step: expected parameters in float32 with precision "{precision}", got {dtype}')


@contextmanager
def matrix_products(precision: Precision, device: torch.device) -> Iterator[None]:
    """Multiply matrices in a precision while the context is active, also within an outer `torch.autocast`."""
    is_bfloat16 = precision == "bfloat16"
    with ExitStack() as stack:
        if is_bfloat16 or torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=is_bfloat16))
        if precision == "tf32":
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("high")
        yield
