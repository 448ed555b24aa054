"""Small networks and plain training loops for the check problems."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, nn

from wakesleep_ext import random
from wakesleep_ext.helmholtz.conditionals import BernoulliConditional, GaussianConditional, StandardGaussianPrior
from wakesleep_ext.helmholtz.models import GenerativeNetwork, RecognitionNetwork
from wakesleep_ext.helmholtz.objectives import sleep_phi_loss

Networks = tuple[RecognitionNetwork, GenerativeNetwork]


@dataclass(frozen=True)
class Effort:
    """The amount of training for a problem."""

    steps: int
    draws: int
    """Dreams or images per step."""


class Keys:
    """Returns successive random keys of one seed."""

    def __init__(self, seed: int = 0) -> None:
        self._seed, self._offsets = seed, count()

    def __call__(self, number: int) -> list[Tensor]:
        return [random.make_key(self._seed, next(self._offsets)) for _ in range(number)]


class Pixelwise(nn.Module):
    """Maps x, `[*, D]`, to packed parameters of q(z|x), `[*, 2K]`. If D = K, latent variable k depends only on pixel k.
    If D = 1, all latent variables depend on the single pixel."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.when_off = nn.Parameter(torch.full((2, latent), 0.3))
        self.when_on = nn.Parameter(torch.full((2, latent), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(self.when_off, self.when_on, x.to(self.when_on.dtype).unsqueeze(-2)).flatten(-2)


class Table(nn.Module):
    """Maps each of the 2^D binary images x, `[*, D]`, to its own parameters, `[*, size]`."""

    def __init__(self, pixels: int, size: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(2**pixels, size))
        self._places = [2**place for place in reversed(range(pixels))]

    def forward(self, x: Tensor) -> Tensor:
        return self.rows[(x * x.new_tensor(self._places)).sum(-1).long()]


class Fixed(nn.Module):
    """A function without parameters."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z)


def machine(recognition: nn.Module, generative: nn.Module, latent: int) -> Networks:
    """Build float64 networks with one Gaussian layer and binary pixels.

    `recognition` maps x to the packed parameters of q(z|x), and `generative` maps z to the logits of x.
    """
    return (
        RecognitionNetwork([GaussianConditional(recognition)]).double(),
        GenerativeNetwork([BernoulliConditional(generative), StandardGaussianPrior(latent)]).double(),
    )


def minimise(
    losses: Iterator[Tensor], parameters: Iterable[nn.Parameter], steps: int, learning_rate: float = 0.1
) -> None:
    """Run Adam. The learning rate decays to a thousandth of its initial value, so that gradient noise averages out."""
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.001 ** (1 / steps))
    for _, loss in zip(range(steps), losses, strict=False):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def sleep(networks: Networks, effort: Effort, learning_rate: float = 0.1) -> None:
    """Train the recognition network on dreams of a fixed generative network."""
    keys, (recognition, generative) = Keys(), networks

    def losses() -> Iterator[Tensor]:
        while True:
            yield sleep_phi_loss(recognition, generative, effort.draws, keys=keys(len(generative)))

    minimise(losses(), recognition.parameters(), effort.steps, learning_rate)
