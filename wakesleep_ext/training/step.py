"""Run training steps: compute the losses and their gradients, and update the weights.

Random keys and learning rates are stored on the device, so a step reads nothing from the host. One step or several can
therefore be recorded and replayed: as a CUDA graph on a GPU, or without the Python interpreter on a CPU. If the batch
is small, Python overhead would double the time of a CPU step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from wakesleep_ext import ops
from wakesleep_ext.helmholtz import objectives
from wakesleep_ext.helmholtz.models import HelmholtzMachine
from wakesleep_ext.replay import Replay, call
from wakesleep_ext.training.config import TrainConfig
from wakesleep_ext.training.data import Images
from wakesleep_ext.training.descent import Descent, Schedule
from wakesleep_ext.training.keys import StepKeys
from wakesleep_ext.training.precision import check_precision, matrix_products
from wakesleep_ext.training.ranks import ALONE, Ranks


class Step:
    """Runs training steps: a wake phase on a batch, then a sleep phase. Some objectives have only one phase.

    Every random draw depends only on the seed and the step number.

    Args:
        machine: the wake phase trains its `generative` network, and the sleep phase its `recognition` network. With
            some objectives, the wake phase also trains `recognition`.
        images: training images, on the device of the machine.
        config: training options.
        ranks: the processes that share the batch and the dreams.

    Raises:
        ValueError: the objective differentiates through draws, but the latent variables are discrete; or the device or
            the parameters do not allow the precision.
    """

    def __init__(self, machine: HelmholtzMachine, images: Images, config: TrainConfig, ranks: Ranks = ALONE) -> None:
        self.machine, self.images, self.config, self.ranks = machine, images, config, ranks
        self.batch_size = min(config.batch_size, len(images))
        self.per_epoch = len(images) // self.batch_size
        self._generative = Descent(machine.generative, config.generative_learning_rate, config)
        self._recognition = Descent(machine.recognition, config.recognition_learning_rate, config)
        self.descents = {"generative": self._generative, "recognition": self._recognition}
        self._dtype = next(machine.parameters()).dtype
        device = images.grey.device
        check_precision(config.precision, self._dtype, device)
        self._schedule = Schedule(config, self.per_epoch, device)
        gradient, self._sleep_weight, self._losses = config.phases(machine.recognition.has_rsample)
        self._wake_losses = objectives.named(
            config.objective, machine, config.num_samples, gradient, config.defensive_fraction
        )
        self.keys = StepKeys(config, len(machine.recognition), device)
        self._number = torch.zeros((), dtype=torch.int64)  # a tensor: a changed int would invalidate the recording
        self.number = 0
        self.replays = {
            (awake, dim): Replay(partial(self._train, awake=awake)) for awake in (False, True) for dim in (1, 2)
        }

    def __call__(self, index: Tensor) -> Tensor:
        """Run one step, or several steps of an epoch. Return their losses in the order of :attr:`names`.

        Args:
            index: int64 `[batch_size]` or `[steps, batch_size]`, the indices of the images in each batch. With replay,
                all calls for several steps must have the same number of them.

        Returns:
            The losses, `[names]` or `[steps, names]`.
        """
        awake, dim = self.is_awake, index.dim()
        run = self.replays[awake, dim] if self.config.replay else partial(call, partial(self._train, awake=awake))
        with matrix_products(self.config.precision, index.device):
            losses: Tensor = run(index)
        self._number += index.shape[:-1].numel()
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
        return self._losses if self.is_awake else ["sleep"]

    def batches(self) -> tuple[Tensor, ...]:
        """Return the image indices of the batches that are left of the epoch. Each epoch has an order of its own.

        Each tensor is for one call: `[steps_per_replay, batch_size]` while as many steps are left, then `[batch_size]`.
        """
        # sorting random draws of a key gives the same order on every device, unlike randperm
        zeros = torch.zeros(len(self.images), dtype=torch.float64, device=self.images.grey.device)
        done = self.number % self.per_epoch
        (key,) = self.keys.at("order", self.number - done)
        order = ops.gaussian_rsample(zeros, zeros, key=key).argsort()
        steps, size = self.config.steps_per_replay, self.batch_size
        left = order[done * size : self.per_epoch * size].view(-1, size)
        groups = len(left) // steps if steps > 1 else 0
        return *left[: groups * steps].view(groups, steps, size), *left[groups * steps :]

    def _train(self, index: Tensor, *, awake: bool) -> Tensor:
        """Run the steps. Every value that can change is held in a tensor, because they may be recorded."""
        if index.dim() == 1:
            return torch.stack(self._train_on(index, awake))
        return torch.stack([loss for batch in index for loss in self._train_on(batch, awake)]).view(len(index), -1)

    def _train_on(self, index: Tensor, awake: bool) -> list[Tensor]:
        """Run one step, and return its losses."""
        losses: list[Tensor] = []
        of_wake: Sequence[Tensor] | None = None
        self._advance([self._generative, self._recognition] if awake else [self._recognition])
        self._schedule.apply(self.keys.step, self.descents.values())
        if awake:
            wake, of_wake = self._wake(index)
            losses += wake
        if not awake or self._sleep_weight > 0:
            losses += self._sleep(of_wake)
        elif of_wake is not None:
            self._update(self._recognition, of_wake, [])
        return losses

    def _advance(self, descents: Sequence[Descent]) -> None:
        """Advance the random keys and the optimizers' step counts to this step, on a GPU in one kernel."""
        steps = [descent.steps for descent in descents if descent.trained()]
        torch.ops.wakesleep_ext.advance_.default(
            [self.keys.offsets, *steps], [len(self.keys.offsets), *[1] * len(steps)]
        )

    def _wake(self, index: Tensor) -> tuple[list[Tensor], Sequence[Tensor] | None]:
        """Train the generative network. Return the losses, and the recognition network's gradient if there is one."""
        (key,) = self.keys.of("binarize")
        total, ranks = len(index), self.ranks
        x = self.images.binarize(key, index, self._dtype)[ranks.rows(total)]
        with ranks.draws(total):
            wake = self._wake_losses(x, self.keys.of("wake"))
            losses = [ranks.part(loss, total) for loss in wake if loss is not None]
            if self._sleep_weight == 1:
                del losses[1:]
                return self._update(self._generative, self._generative.gradients(losses[0]), losses), None
            of_theta, of_phi = self._generative.trained(), self._recognition.trained()
            gradients = self._generative.gradients_of(sum(losses[1:], losses[0]), [*of_theta, *of_phi])
        number = len(of_theta)
        return self._update(self._generative, gradients[:number], losses), gradients[number:]

    def _sleep(self, of_wake: Sequence[Tensor] | None) -> list[Tensor]:
        """Train the recognition network on dreams. The gradient of the wake phase is added if there is one."""
        machine, weight, total = self.machine, self._sleep_weight, self.config.num_dreams or self.batch_size
        rows, keys = self.ranks.rows(total), self.keys.of("dream")
        with self.ranks.draws(total):
            mean = objectives.sleep_phi_loss(machine.recognition, machine.generative, rows.stop - rows.start, keys=keys)
            loss = self.ranks.part(mean, total)
            gradients = self._recognition.gradients(loss if of_wake is None else weight * loss)
        if of_wake is not None:
            pairs = zip(gradients, of_wake, strict=True)
            gradients = tuple(torch.add(a, b, alpha=1 - weight) for a, b in pairs)
        return self._update(self._recognition, gradients, [loss])

    def _update(self, descent: Descent, gradients: Sequence[Tensor], losses: Sequence[Tensor]) -> list[Tensor]:
        """Update the weights of a network with the gradients of all ranks. Return the losses of all ranks."""
        summed = self.ranks.sum([*gradients, *(loss.detach() for loss in losses)])
        descent.descend(summed[: len(gradients)])
        return summed[len(gradients) :]
