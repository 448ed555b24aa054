"""The wake-sleep loop: two phases, two optimizers, and nothing it needs to know of the networks.

Every random draw of a run is a function of the seed and of the step it belongs to, so a run is
repeated by its seed, and continued from nothing more than weights, optimizers and step number.

A step takes nothing from the host: keys and learning rates lie on the device, and a CUDA graph of it can be replayed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from wakesleep_ext import ops, random
from wakesleep_ext.data import Images
from wakesleep_ext.models import HelmholtzMachine
from wakesleep_ext.objectives import sleep_phi_loss, wake_theta_loss
from wakesleep_ext.replay import Replay

Phase = Literal["wake", "sleep"]

_DEVICES_WITH_GRAPHS = ("cuda",)
_DEVICES_WITH_FUSED_ADAM = ("cpu", "cuda")


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Raises:
        ValueError: a value is out of range.
    """

    seed: int = 0
    """Seed of the initial weights and of every draw."""
    epochs: int = 500
    """Passes over the training images."""
    batch_size: int = 100
    """Images in a wake step, and dreams in a sleep step."""
    num_samples: int = 1
    """Samples of z for each image in the wake phase, L."""
    wake_learning_rate: float = 1e-3
    """Step size of the generative network."""
    sleep_learning_rate: float = 1e-3
    """Step size of the recognition network."""
    learning_rate_decay: float = 1.0
    """Factor that both step sizes fall by, exponentially, in the course of the run; 1: constant."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's running means of the gradient and of its square."""
    adam_epsilon: float = 1e-4
    """Adam's epsilon."""
    cuda_graph: bool = True
    """On a GPU, capture a step as one CUDA graph and replay it. The numbers are the same without, but a replay runs no
    Python: turn it off for networks that have hooks, or that look at values."""

    def __post_init__(self) -> None:
        within = {
            "seed": 0 <= self.seed < 2**63,
            "epochs": self.epochs >= 0,
            "batch_size": self.batch_size >= 1,
            "num_samples": self.num_samples >= 1,
            "wake_learning_rate": 0 < self.wake_learning_rate < math.inf,
            "sleep_learning_rate": 0 < self.sleep_learning_rate < math.inf,
            "learning_rate_decay": 0 < self.learning_rate_decay <= 1,
            "adam_betas": all(0 <= beta < 1 for beta in self.adam_betas),
            "adam_epsilon": 0 <= self.adam_epsilon < math.inf,
        }
        for name, valid in within.items():
            if not valid:
                raise ValueError(f"TrainConfig: {name} is out of range, got {getattr(self, name)}")


class DivergedError(ArithmeticError):
    """A loss is no longer finite; the message names the phase and the step."""


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training images came to."""

    epoch: int
    """Passes completed, this one included."""
    step: int
    """Steps completed."""
    wake_loss: float
    """Mean wake loss, nats per image."""
    sleep_loss: float
    """Mean sleep loss, nats per dream."""
    seconds: float
    """Duration."""


class _Draw(IntEnum):
    """The draws of one step, each with a key of its own."""

    ORDER = 0  # of the images; used by the first step of an epoch
    BINARIZE = 1
    WAKE = 2
    DREAM_Z = 3
    DREAM_X = 4


class Trainer:
    """Trains a Helmholtz machine on images, both on one device.

    Args:
        machine: its `generative` network is trained in the wake phase, `recognition` in sleep.
        images: binarised anew each time they are visited. A last batch that would be smaller than
            the others is left out; which images that concerns changes with every epoch.
        config: how to train.
    """

    def __init__(self, machine: HelmholtzMachine, images: Images, config: TrainConfig) -> None:
        self.machine = machine
        self.images = images
        self.config = config
        self.batch_size = min(config.batch_size, len(images))
        self.steps_per_epoch = len(images) // self.batch_size
        self.networks: dict[Phase, nn.Module] = {
            "wake": machine.generative,
            "sleep": machine.recognition,
        }
        device = images.grey.device
        self._capturable = device.type in _DEVICES_WITH_GRAPHS
        self.optimizers = {phase: self._optimizer(network) for phase, network in self.networks.items()}
        self._keys = torch.empty(len(_Draw), 2, dtype=torch.int64, device=device)
        self._key = self._keys.unbind()
        self._offsets = self._keys[:, 1]
        self.step = 0
        replayed = config.cuda_graph and self._capturable
        self._run = Replay(self._train, self._changing) if replayed else self._train

    def _optimizer(self, network: nn.Module) -> torch.optim.Adam:
        """Adam with its state, which it would not make itself before its first step."""
        optimizer = torch.optim.Adam(
            network.parameters(),
            betas=self.config.adam_betas,
            eps=self.config.adam_epsilon,
            fused=self.images.grey.device.type in _DEVICES_WITH_FUSED_ADAM,
            capturable=self._capturable,
        )
        for parameter in network.parameters():
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return optimizer

    @property
    def step(self) -> int:
        """Steps completed; setting it sets the keys of the draws, too."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        keys = [random.make_key(self.config.seed, step * len(_Draw) + draw) for draw in _Draw]
        self._keys.copy_(torch.stack(keys))
        self._step = step

    def epochs(self, on_step: Callable[[], object] = lambda: None) -> Iterator[Epoch]:
        """Train to the end of `config.epochs`, pausing after each epoch.

        Args:
            on_step: called after each step.

        Raises:
            DivergedError: a loss or weight became infinite or NaN in the epoch that was to be
                yielded next.
        """
        while self.step < self.config.epochs * self.steps_per_epoch:
            start = time.perf_counter()
            of_steps = []
            for index in self._batches():
                of_steps.append(self.take_step(index))
                on_step()
            losses = torch.stack(of_steps).cpu()
            self._check_finite(losses)
            wake_loss, sleep_loss = losses.double().mean(0).tolist()
            yield Epoch(
                epoch=self.step // self.steps_per_epoch,
                step=self.step,
                wake_loss=wake_loss,
                sleep_loss=sleep_loss,
                seconds=time.perf_counter() - start,
            )

    def _batches(self) -> tuple[Tensor, ...]:
        # An order from the sort of keyed draws is the same on every device, randperm's is not.
        zeros = torch.zeros(len(self.images), dtype=torch.float64, device=self.images.grey.device)
        order = ops.gaussian_rsample(zeros, zeros, key=self._key[_Draw.ORDER]).argsort()
        return tuple(order.split(self.batch_size)[: self.steps_per_epoch])

    def take_step(self, index: Tensor) -> Tensor:
        """One wake step on a batch, then one sleep step on as many dreams.

        Args:
            index: int64 `[batch_size]`, which images the batch has.

        Returns:
            Wake loss and sleep loss, `[2]`, nats per image and per dream. They are not looked at, since that would stop
            a GPU; :meth:`epochs` does.
        """
        losses = self._run(index)
        self._step += 1
        return losses

    def _train(self, index: Tensor) -> Tensor:
        """The step itself, which may be captured: what differs from step to step, it takes from tensors."""
        recognition, generative = self.machine.recognition, self.machine.generative
        config, decay = self.config, self._decay()

        x = self.images.binarize(self._key[_Draw.BINARIZE], index, next(generative.parameters()).dtype)
        wake_loss = wake_theta_loss(recognition, generative, x, config.num_samples, key=self._key[_Draw.WAKE])
        self._descend("wake", wake_loss, config.wake_learning_rate * decay)

        sleep_loss = sleep_phi_loss(
            recognition,
            generative,
            self.batch_size,
            self.machine.config.latent,
            keys=(self._key[_Draw.DREAM_Z], self._key[_Draw.DREAM_X]),
        )
        self._descend("sleep", sleep_loss, config.sleep_learning_rate * decay)

        self._offsets.add_(len(_Draw))
        return torch.stack((wake_loss.detach(), sleep_loss.detach()))

    def _decay(self) -> float | Tensor:
        """What both learning rates have fallen to; a tensor where a graph would keep the number of its first step."""
        if self.config.learning_rate_decay == 1:
            return 1.0
        step = self._offsets[0].double() / len(_Draw) if self._capturable else self._step
        return self.config.learning_rate_decay ** (step / (self.config.epochs * self.steps_per_epoch))

    def _descend(self, phase: Phase, loss: Tensor, learning_rate: float | Tensor) -> None:
        optimizer = self.optimizers[phase]
        (group,) = optimizer.param_groups
        group["lr"] = learning_rate
        trained = [parameter for parameter in group["params"] if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, trained)  # those that others may have left in .grad do not enter
        states = [optimizer.state[parameter] for parameter in trained]
        # What optimizer.step() would call; around it, it takes 40 µs of the 750 that a phase of 20 images has on a CPU.
        with torch.no_grad():
            adam(
                trained,
                list(gradients),
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=group["fused"],
                capturable=group["capturable"],
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=learning_rate,
                weight_decay=0.0,
                eps=group["eps"],
                maximize=False,
            )

    def _changing(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        return [*self.state_dict().values(), self._keys]

    def _check_finite(self, losses: Tensor) -> None:
        """Losses `[steps, 2]` of the epoch; read once an epoch, for each look stops a GPU."""
        phases: tuple[Phase, ...] = ("wake", "sleep")
        for row, column in (~losses.isfinite()).nonzero().tolist():
            step = self.step - len(losses) + row + 1
            raise DivergedError(
                f"the {phases[column]} loss became {losses[row, column].item()} at step {step} "
                f"(epoch {self.step // self.steps_per_epoch})"
            )
        for phase, network in self.networks.items():
            if not all(parameter.isfinite().all() for parameter in network.parameters()):
                raise DivergedError(f"the {phase} phase made a weight infinite at step {self.step}")

    def state_dict(self) -> dict[str, Tensor]:
        """Weights and optimizer state by name, `machine.…`, `optimizer.wake.…`; not copies.

        With `step`, all that continuing a run takes.
        """
        tensors = {f"machine.{name}": value for name, value in self.machine.state_dict().items()}
        for phase, network in self.networks.items():
            for name, parameter in network.named_parameters():
                for slot, value in self.optimizers[phase].state[parameter].items():
                    tensors[f"optimizer.{phase}.{name}.{slot}"] = value
        return tensors
