"""Assign a random key to each draw of a training step.

Keys are functions of the seed and the step number. They are on the device, so a recorded step can advance them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wakesleep_ext import random
from wakesleep_ext.training.config import TrainConfig


class StepKeys:
    """The random keys of the current step.

    Args:
        config: training options.
        layers: number of stochastic layers.
        device: device of the keys.

    Attributes:
        values: the keys, int64 `[draws, 2]`.
        offsets: their offsets, a view of `values`. They grow by `len(offsets)` per step.
    """

    def __init__(self, config: TrainConfig, layers: int, device: torch.device) -> None:
        counts = {
            "order": 1,  # order of the images; only the first step of an epoch uses this key
            "binarize": 1,
            "wake": 2 * layers + 1 if config.defensive_fraction else layers,
            "dream": layers + 1,
        }
        self._seed, self._draws, first = config.seed, dict[str, range](), 0
        for name, count in counts.items():
            self._draws[name] = range(first, first + count)
            first += count
        self.values = torch.empty(first, 2, dtype=torch.int64, device=device)
        self.offsets = self.values[:, 1]
        self._keys = self.values.unbind()

    def of(self, name: str) -> tuple[Tensor, ...]:
        """Return the keys of the draws with this name."""
        numbers = self._draws[name]
        return self._keys[numbers.start : numbers.stop]

    def at(self, name: str, step: int) -> list[Tensor]:
        """Compute the keys that :meth:`of` returns after `step` completed steps."""
        count, device = len(self.values), self.values.device
        return [random.make_key(self._seed, step * count + draw, device) for draw in self._draws[name]]

    def rewind(self, step: int) -> None:
        """Set the keys to those of the previous step, because a step begins by advancing them."""
        self.values.copy_(torch.stack([key for name in self._draws for key in self.at(name, step)]))
        self.offsets.sub_(len(self.offsets))

    def step(self) -> Tensor:
        """Return the number of completed steps, a 0-dimensional float64 tensor on the device."""
        return self.offsets[0].double() / len(self.offsets)
