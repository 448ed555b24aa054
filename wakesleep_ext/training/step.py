"""Run one training step: compute the losses and their gradients, and update the weights.

Random keys and learning rates are stored on the device, so a step reads nothing from the host. It can therefore be
recorded and replayed: as a CUDA graph on a GPU, or without the Python interpreter on a CPU. If the batch is small,
Python overhead would double the time of a CPU step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from wakesleep_ext import ops
from wakesleep_ext.helmholtz import objectives
from wakesleep_ext.helmholtz.models import HelmholtzMachine
from wakesleep_ext.helmholtz.objectives import WakeLosses
from wakesleep_ext.replay import Replay, call
from wakesleep_ext.training.config import SLEEP_WEIGHTS, TrainConfig
from wakesleep_ext.training.data import Images
from wakesleep_ext.training.descent import Descent, Schedule
from wakesleep_ext.training.keys import StepKeys


class Step:
    """Runs one training step: a wake phase on a batch, then a sleep phase. Some objectives have only one phase.

    Every random draw depends only on the seed and the step number.

    Args:
        machine: the wake phase trains its `generative` network, and the sleep phase its `recognition` network. With
            some objectives, the wake phase also trains `recognition`.
        images: training images, on the device of the machine.
        config: training options.

    Raises:
        ValueError: the objective differentiates through draws, but the latent variables are discrete; or the precision
            is TF32, but the device is not a GPU.
    """

    def __init__(self, machine: HelmholtzMachine, images: Images, config: TrainConfig) -> None:
        self.machine, self.images, self.config = machine, images, config
        self.batch_size = min(config.batch_size, len(images))
        self.per_epoch = len(images) // self.batch_size
        self._generative = Descent(machine.generative, config.generative_learning_rate, config)
        self._recognition = Descent(machine.recognition, config.recognition_learning_rate, config)
        self._dtype = next(machine.parameters()).dtype
        device = images.grey.device
        if config.precision == "tf32" and device.type != "cuda":
            raise ValueError(f'Step: expected precision "float32" on {device}, got "tf32", which only a GPU has')
        self._schedule = Schedule(config, self.per_epoch, device)
        self._wake_losses = self._objective()
        chosen = config.sleep_weight
        self._sleep_weight = SLEEP_WEIGHTS[config.objective] if chosen is None else chosen
        self.keys = StepKeys(config, len(machine.recognition), device)
        self._number = torch.zeros((), dtype=torch.int64)  # a tensor: a changed int would invalidate the recording
        self.number = 0
        self.replays = {awake: Replay(partial(self._train, awake=awake)) for awake in (False, True)}

    def __call__(self, index: Tensor) -> Tensor:
        """Run one step, and return its losses in the order of :attr:`names`.

        Args:
            index: int64 `[batch_size]`, the indices of the images in the batch.
        """
        awake = self.is_awake
        run = self.replays[awake] if self.config.replay else partial(call, partial(self._train, awake=awake))
        with _tf32() if self.config.precision == "tf32" else nullcontext():
            losses: Tensor = run(index)
        self._number += 1
        return losses

    @property
    def number(self) -> int:
        """Number of completed steps. Setting it also sets the random keys."""
        return int(self._number)

    @number.setter
    def number(self, number: int) -> None:
        self.keys.rewind(number)
        self._number.fill_(number)

    @property
    def is_awake(self) -> bool:
        """True if the next step has a wake phase. The first `sleep_warm_up` epochs have none."""
        return self.number >= self.config.sleep_warm_up * self.per_epoch

    @property
    def names(self) -> list[str]:
        """Names of the losses that the next step returns."""
        if not self.is_awake:
            return ["sleep"]
        config = self.config
        both = config.objective == "reweighted-wake-sleep" and config.phi_gradient in (None, "score", "score-cv")
        return ["wake"] + ["wake_phi"] * (both and self._sleep_weight < 1) + ["sleep"] * (self._sleep_weight > 0)

    @property
    def descents(self) -> dict[str, Descent]:
        return {"generative": self._generative, "recognition": self._recognition}

    def batches(self) -> tuple[Tensor, ...]:
        """Shuffle the images for an epoch that starts at the current step, and return the image indices per batch."""
        # sorting random draws of a key gives the same order on every device, unlike randperm
        zeros = torch.zeros(len(self.images), dtype=torch.float64, device=self.images.grey.device)
        (key,) = self.keys.at("order", self.number)
        order = ops.gaussian_rsample(zeros, zeros, key=key).argsort()
        return tuple(order.split(self.batch_size)[: self.per_epoch])

    def _objective(self) -> Callable[[Tensor, Sequence[Tensor]], WakeLosses]:
        """Return a function that maps images and keys to the losses of the wake phase."""
        recognition, generative = self.machine.recognition, self.machine.generative
        config = self.config
        if config.objective == "reweighted-wake-sleep":
            phi_gradient, fraction = config.phi_gradient or "score", config.defensive_fraction
            objectives.require_phi_gradient(phi_gradient, recognition, config.num_samples, fraction)
            return lambda x, keys: objectives.reweighted_wake_losses(
                recognition,
                generative,
                x,
                config.num_samples,
                phi_gradient=phi_gradient,
                defensive_fraction=fraction,
                keys=keys,
            )
        loss = {
            "wake-sleep": objectives.wake_theta_loss,
            "elbo": objectives.elbo_loss,
            "iwae": objectives.iwae_loss,
            "dreg": objectives.dreg_loss,
            "vimco": objectives.vimco_loss,
        }[config.objective]
        if config.objective == "vimco":
            objectives.require_several(config.num_samples, "objective 'vimco'")
        elif config.objective != "wake-sleep":
            objectives.require_rsample(recognition)
        return lambda x, keys: WakeLosses(loss(recognition, generative, x, config.num_samples, keys=keys))

    def _train(self, index: Tensor, *, awake: bool) -> Tensor:
        """Run the step. Every value that can change is held in a tensor, because the step may be recorded."""
        losses: list[Tensor] = []
        of_wake: Sequence[Tensor] | None = None
        self._advance([self._generative, self._recognition] if awake else [self._recognition])
        self._set_learning_rates()
        if awake:
            wake, of_wake = self._wake(index)
            losses += wake
        if not awake or self._sleep_weight > 0:
            losses.append(self._sleep(of_wake))
        elif of_wake is not None:
            self._recognition.descend(of_wake)
        return torch.stack([loss.detach() for loss in losses])

    def _advance(self, descents: Sequence[Descent]) -> None:
        """Advance the random keys and the optimizers' step counts to this step, on a GPU in one kernel."""
        steps = [descent.steps for descent in descents if descent.trained()]
        torch.ops.wakesleep_ext.advance_.default(
            [self.keys.offsets, *steps], [len(self.keys.offsets), *[1] * len(steps)]
        )

    def _wake(self, index: Tensor) -> tuple[list[Tensor], Sequence[Tensor] | None]:
        """Train the generative network. Return the losses, and the recognition network's gradient if there is one."""
        (key,) = self.keys.of("binarize")
        x = self.images.binarize(key, index, self._dtype)
        theta, phi = self._wake_losses(x, self.keys.of("wake"))
        if self._sleep_weight == 1:
            self._generative.descend(self._generative.gradients(theta))
            return [theta], None
        total = theta if phi is None else theta + phi
        of_theta, of_phi = self._generative.trained(), self._recognition.trained()
        gradients = self._generative.gradients_of(total, [*of_theta, *of_phi])
        self._generative.descend(gradients[: len(of_theta)])
        return [theta] if phi is None else [theta, phi], gradients[len(of_theta) :]

    def _sleep(self, of_wake: Sequence[Tensor] | None) -> Tensor:
        """Train the recognition network on dreams. The gradient of the wake phase is added if there is one."""
        loss = objectives.sleep_phi_loss(
            self.machine.recognition,
            self.machine.generative,
            self.config.num_dreams or self.batch_size,
            keys=self.keys.of("dream"),
        )
        if of_wake is None:
            self._recognition.descend(self._recognition.gradients(loss))
        else:
            gradients = self._recognition.gradients(self._sleep_weight * loss)
            wake_weight, pairs = 1 - self._sleep_weight, zip(gradients, of_wake, strict=True)
            self._recognition.descend([torch.add(a, b, alpha=wake_weight) for a, b in pairs])
        return loss

    def _set_learning_rates(self) -> None:
        """Set the learning rates for this step."""
        factor = self._schedule.factor(self.keys.step())
        if factor is not None:
            for descent in self.descents.values():
                descent.set_learning_rate(factor)


@contextmanager
def _tf32() -> Iterator[None]:
    """Let the BLAS of a GPU multiply float32 matrices in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
