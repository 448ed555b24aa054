"""Describe what happens in an epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
        """Return the line of the metrics file for this epoch, with the ELBO of the test images after it."""
        losses = {f"{name}_loss": loss for name, loss in self.losses.items()}
        return {"epoch": self.epoch, "step": self.step, "seconds": self.seconds, **losses, "test_elbo": test_elbo}
