"""The wake-sleep loop: steps by epochs, until the last, or until a loss is no longer finite.

A run is repeated by its seed, and continued from nothing more than weights, optimizers and step number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wakesleep_ext.helmholtz.models import HelmholtzMachine
from wakesleep_ext.training.config import TrainConfig
from wakesleep_ext.training.data import Images
from wakesleep_ext.training.step import Step


class DivergedError(ArithmeticError):
    """A loss is no longer finite; the message names the phase and the step."""


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training images came to."""

    epoch: int
    """Passes completed, this one included."""
    step: int
    """Steps completed."""
    losses: dict[str, float]
    """Means over the steps, in nats: "wake", per image; "wake_phi", per image, of the recognition network in the
    reweighted wake phase; "sleep", per dream. Those that there were."""
    seconds: float
    """Duration."""


class Trainer:
    """Trains a Helmholtz machine on images, both on one device.

    Args:
        machine: its `generative` network is trained in the wake phase, `recognition` in sleep; in the wake phase too,
            if the objective says so.
        images: each visit binarises them again. A last batch that would be smaller than the others is left out; which
            images that concerns changes with every epoch.
        config: how to train.

    Attributes:
        take_step: the step, to be called with the indices of a batch, int64 `[batch_size]`.

    Raises:
        ValueError: the objective differentiates through draws, and the latent variables are discrete.
        TypeError: a parameter is in half precision, in which Adam's steps and moments would be lost.
    """

    def __init__(self, machine: HelmholtzMachine, images: Images, config: TrainConfig) -> None:
        for name, parameter in machine.named_parameters():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"Trainer: expected the machine's parameters to be float32 or float64, got {parameter.dtype} for "
                    f"{name}; Adam's small steps are lost in it. Keep them in float32, and run take_step or epochs "
                    f"under torch.autocast to compute in {parameter.dtype}"
                )
        self.take_step = Step(machine, images, config)

    @property
    def machine(self) -> HelmholtzMachine:
        """What is trained."""
        return self.take_step.machine

    @property
    def config(self) -> TrainConfig:
        """How."""
        return self.take_step.config

    @property
    def images(self) -> Images:
        """On what."""
        return self.take_step.images

    @property
    def steps_per_epoch(self) -> int:
        return self.take_step.per_epoch

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Of the generative and the recognition network."""
        return {name: descent.optimizer for name, descent in self.take_step.descents.items()}

    @property
    def step(self) -> int:
        """Steps completed; setting it sets the keys of the draws, too."""
        return self.take_step.number

    @step.setter
    def step(self, step: int) -> None:
        self.take_step.number = step

    def epochs(self, on_step: Callable[[], object] = lambda: None) -> Iterator[Epoch]:
        """Train to the end of `config.epochs`, pausing after each epoch.

        Args:
            on_step: called after each step.

        Raises:
            DivergedError: a loss or weight became infinite or NaN in the epoch that was to be
                yielded next.
        """
        while self.step < self.config.epochs * self.steps_per_epoch:
            start, names = time.perf_counter(), self.take_step.names
            of_steps = []
            for index in self.take_step.batches():
                of_steps.append(self.take_step(index))
                on_step()
            losses = torch.stack(of_steps).cpu()
            self._check_finite(names, losses)
            yield Epoch(
                epoch=self.step // self.steps_per_epoch,
                step=self.step,
                losses=dict(zip(names, losses.double().mean(0).tolist(), strict=True)),
                seconds=time.perf_counter() - start,
            )

    def _check_finite(self, names: Sequence[str], losses: Tensor) -> None:
        """Losses `[steps, names]` of the epoch; read once an epoch, for each look stops a GPU."""
        for row, column in (~losses.isfinite()).nonzero().tolist():
            step = self.step - len(losses) + row + 1
            raise DivergedError(
                f"the {names[column]} loss became {losses[row, column].item()} at step {step} "
                f"(epoch {self.step // self.steps_per_epoch})"
            )
        for name, descent in self.take_step.descents.items():
            if not all(parameter.isfinite().all() for parameter in descent.network.parameters()):
                raise DivergedError(f"a weight of the {name} network became infinite at step {self.step}")

    def state_dict(self) -> dict[str, Tensor]:
        """Weights and optimizer state by name, `machine.…`, `optimizer.generative.…`; not copies.

        With `step`, all that continuing a run takes.
        """
        tensors = {f"machine.{name}": value for name, value in self.machine.state_dict().items()}
        for of, descent in self.take_step.descents.items():
            tensors |= {f"optimizer.{of}.{name}": value for name, value in descent.state()}
        return tensors

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over, in place, what :meth:`state_dict` gave. `step` is to be set, too.

        Raises:
            KeyError: a tensor is missing; nothing has been changed.
        """
        own = self.state_dict()
        found = {name: tensors[name] for name in own}
        for name, tensor in own.items():
            tensor.copy_(found[name])
