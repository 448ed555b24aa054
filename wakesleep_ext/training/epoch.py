"""Collect the losses of an epoch, and describe what happens in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wakesleep_ext.training.divergence import DivergedError, require_finite_losses


@dataclass(frozen=True)
class Epoch:
    """The results of one pass over the training images."""

    epoch: int
    """Epochs completed, including this one."""
    step: int
    """Steps completed."""
    losses: dict[str, float]
    """Mean losses over the steps, in nats. "wake" and "wake_phi" are per image, "sleep" is per dream. "wake_phi" is the
    recognition network's loss in the reweighted wake phase. Losses that the objective does not have are absent."""
    seconds: float
    """Duration of the epoch in seconds."""

    def record(self, test_elbo: float) -> dict[str, Any]:
        """Return the line of the metrics file for this epoch, with the ELBO of the test images after it.

        Raises:
            DivergedError: the ELBO is infinite or NaN.
        """
        if not math.isfinite(test_elbo):
            raise DivergedError(f"the test ELBO became {test_elbo} at step {self.step}")
        losses = {f"{name}_loss": loss for name, loss in self.losses.items()}
        return {"epoch": self.epoch, "step": self.step, "seconds": self.seconds, **losses, "test_elbo": test_elbo}


class Losses:
    """The losses of the steps of an incomplete epoch. They stay on the device until they are checked.

    Args:
        names: names of the losses of a step.
        state: what :meth:`state_dict` returned, to resume an epoch.
    """

    def __init__(self, names: Sequence[str], state: Mapping[str, Tensor]) -> None:
        self._names = names
        self._checked = [*state.get("epoch.losses", ())]  # of each step, on the CPU
        self._unchecked: list[Tensor] = []  # of the steps after these, on the device

    def __len__(self) -> int:
        return len(self._checked) + len(self._unchecked)

    @property
    def unchecked(self) -> int:
        """Number of steps whose losses are not checked yet."""
        return len(self._unchecked)

    def append(self, losses: Tensor) -> None:
        """Add the losses of one step or several, `[names]` or `[steps, names]`."""
        self._unchecked += losses.unbind() if losses.dim() > 1 else [losses]

    def check_finite(self, step: int) -> None:
        """Check the losses since the last check, given the number of the last step. Waits for the device.

        Raises:
            DivergedError: a loss is infinite or NaN.
        """
        if self._unchecked:
            losses, self._unchecked = torch.stack(self._unchecked).cpu(), []
            require_finite_losses(losses, self._names, step)
            self._checked += losses.unbind()

    def means(self) -> dict[str, float]:
        """Return the means over the steps, by name. Call :meth:`check_finite` first."""
        return dict(zip(self._names, torch.stack(self._checked).double().mean(0).tolist(), strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the losses of all steps as `epoch.losses`, `[steps, names]`, on the CPU, if there are any."""
        losses = [*self._checked, *(row.cpu() for row in self._unchecked)]
        return {"epoch.losses": torch.stack(losses)} if losses else {}
