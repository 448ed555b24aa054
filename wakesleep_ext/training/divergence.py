"""Detect that training diverges: a loss, a weight or a moment that is infinite or NaN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class DivergedError(ArithmeticError):
    """A loss, a weight or a moment is no longer finite; the message names it and the step."""


def require_finite_losses(losses: Tensor, names: Sequence[str], step: int) -> None:
    """Check the losses of the last steps, `[steps, names]`, of which the last is number `step`.

    Raises:
        DivergedError: a loss is infinite or NaN; the message names the first one, which is that of a phase.
    """
    for row, column in (~losses.isfinite()).nonzero().tolist():
        number, value = step - len(losses) + row + 1, losses[row, column].item()
        raise DivergedError(f"the {names[column]} loss became {value} at step {number}")


def require_finite_state(state: Mapping[str, Tensor], step: int) -> None:
    """Check the weights, `machine.…`, and the optimizer state, `optimizer.…`. Waits for the device.

    Raises:
        DivergedError: a number is infinite or NaN.
    """
    numbers = {name: value for name, value in state.items() if value.is_floating_point()}
    if torch.nn.utils.get_total_norm(numbers.values()).isfinite():  # ten times as fast on a CPU as looking at each
        return
    finite = torch.stack([value.isfinite().all() for value in numbers.values()]).tolist()
    for name, is_finite in zip(numbers, finite, strict=True):  # all, if only the norm overflowed
        if not is_finite:
            kind, network, _ = name.split(".", 2)
            of = "weight" if kind == "machine" else "moment"
            raise DivergedError(f"a {of} of the {network} network is not finite after step {step}: {name}")
