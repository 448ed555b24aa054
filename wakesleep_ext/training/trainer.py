"""Run the wake-sleep loop until the last epoch, or until a loss is not finite.

The seed determines every random draw of a run. The weights, optimizer state and step number suffice to resume a run.
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
    """A loss or weight is no longer finite; the message names the loss or the network, and the step."""


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


class Trainer:
    """Trains a Helmholtz machine on images. Both must be on the same device.

    Args:
        machine: the wake phase trains `generative`, and with some objectives both networks. Sleep trains `recognition`.
        images: training images, binarised again each time they are used. An incomplete last batch is dropped. Images
            are shuffled, so each epoch drops different images.
        config: training options.

    Attributes:
        take_step: runs one step, given the indices of a batch, int64 `[batch_size]`.

    Raises:
        ValueError: the objective differentiates through draws, but the latent variables are discrete.
        TypeError: a parameter is not float32 or float64. Half precision would lose Adam's updates and moments.
    """

    def __init__(self, machine: HelmholtzMachine, images: Images, config: TrainConfig) -> None:
        for name, parameter in machine.named_parameters():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"Trainer: expected the machine's parameters to be float32 or float64, got {parameter.dtype} for "
                    f"{name}; Adam's small updates would be rounded away. Keep the parameters in float32, and run "
                    f"take_step or epochs under torch.autocast to compute in {parameter.dtype}"
                )
        self.take_step = Step(machine, images, config)

    @property
    def machine(self) -> HelmholtzMachine:
        """The model that is trained."""
        return self.take_step.machine

    @property
    def config(self) -> TrainConfig:
        """The training options."""
        return self.take_step.config

    @property
    def images(self) -> Images:
        """The training images."""
        return self.take_step.images

    @property
    def steps_per_epoch(self) -> int:
        return self.take_step.per_epoch

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizers of the generative and the recognition network."""
        return {name: descent.optimizer for name, descent in self.take_step.descents.items()}

    @property
    def step(self) -> int:
        """Number of completed steps. Setting it also sets the random keys of the next step."""
        return self.take_step.number

    @step.setter
    def step(self, step: int) -> None:
        self.take_step.number = step

    def epochs(self, on_step: Callable[[], object] = lambda: None) -> Iterator[Epoch]:
        """Train until `config.epochs` epochs are complete, and yield the results of each epoch.

        Args:
            on_step: called after each step.

        Raises:
            DivergedError: a loss or weight became infinite or NaN. The epoch in which this happened is not yielded.
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
        """Check that the losses of an epoch, `[steps, names]`, and all weights are finite.

        The trainer checks once per epoch, since each check synchronises the GPU.
        """
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
        """Return weights and optimizer state by name: `machine.…`, `optimizer.generative.…`.

        The tensors are not copies. These tensors and `step` suffice to resume a run.
        """
        tensors = {f"machine.{name}": value for name, value in self.machine.state_dict().items()}
        for of, descent in self.take_step.descents.items():
            tensors |= {f"optimizer.{of}.{name}": value for name, value in descent.state()}
        return tensors

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the tensors that :meth:`state_dict` returned, in place. To resume a run, set `step` as well.

        Raises:
            KeyError: a tensor is missing. In this case, no tensor is modified.
        """
        own = self.state_dict()
        found = {name: tensors[name] for name in own}
        for name, tensor in own.items():
            tensor.copy_(found[name])
