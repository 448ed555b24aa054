"""Run the wake-sleep loop until the last epoch, or until a loss or a weight is not finite.

The seed determines every random draw of a run. The weights, the optimizer state, the step number and the losses of an
incomplete epoch suffice to resume a run after any step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from wakesleep_ext.helmholtz.models import HelmholtzMachine
from wakesleep_ext.training.config import TrainConfig
from wakesleep_ext.training.data import Images
from wakesleep_ext.training.descent import require_wide
from wakesleep_ext.training.divergence import require_finite_state
from wakesleep_ext.training.epoch import Epoch as Epoch  # re-exported
from wakesleep_ext.training.epoch import Losses
from wakesleep_ext.training.ranks import ALONE, Ranks
from wakesleep_ext.training.step import Step

STEPS_BETWEEN_CHECKS = 100
"""After this many steps, and the rest of their group, the trainer checks that all numbers are finite. Each check waits
for the device."""


class Trainer:
    """Trains a Helmholtz machine on images. Both must be on the same device.

    Args:
        machine: the wake phase trains `generative`, and with some objectives both networks. Sleep trains `recognition`.
        images: training images, binarised again each time they are used. An incomplete last batch is dropped. Images
            are shuffled, so each epoch drops different images.
        config: training options.
        ranks: the processes that train together; only this one by default. They take the same steps.

    Attributes:
        take_step: runs one step or several, given the indices of each batch, int64 `[batch_size]` or
            `[steps, batch_size]`.
        seconds: duration of the current epoch so far. To resume in the middle of an epoch, set it as well.

    Raises:
        ValueError: the objective differentiates through draws, but the latent variables are discrete.
        TypeError: a parameter is not float32 or float64. Half precision would lose Adam's updates and moments.
    """

    def __init__(self, machine: HelmholtzMachine, images: Images, config: TrainConfig, ranks: Ranks = ALONE) -> None:
        require_wide(machine)
        self.machine, self.images, self.config, self.ranks = machine, images, config, ranks
        self.take_step = Step(machine, images, config, ranks)
        self.steps_per_epoch = self.take_step.per_epoch
        self.seconds = 0.0
        self._losses = Losses(self.take_step.names, {})

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
        is_same_epoch = len(self._losses) == step % self.steps_per_epoch
        self._losses = Losses(self.take_step.names, self._losses.state_dict() if is_same_epoch else {})

    def epochs(self, on_step: Callable[[], object] = lambda: None) -> Iterator[Epoch]:
        """Train until `config.epochs` epochs are complete, and yield the results of each epoch.

        Args:
            on_step: called once for each step. If `steps_per_replay` is more than 1, the calls for a group of steps
                follow its last step, so `step` is the same in all of them. If a call raises an error, the group is
                complete and its other calls are left out. Call this method again to continue after the group.

        Raises:
            DivergedError: a loss, a weight or a moment became infinite or NaN, fewer than 100 + `steps_per_replay`
                steps ago. The epoch in which this happened is not yielded.
        """
        while self.step < self.config.epochs * self.steps_per_epoch:
            start = time.perf_counter() - self.seconds
            for index in self.take_step.batches():
                self._losses.append(self.take_step(index))
                self.seconds = time.perf_counter() - start
                if self._losses.unchecked >= STEPS_BETWEEN_CHECKS:
                    self.check_finite()
                for _ in range(index.shape[:-1].numel()):
                    on_step()
            self.check_finite()
            losses, self._losses = self._losses.means(), Losses(self.take_step.names, {})
            seconds, self.seconds = time.perf_counter() - start, 0.0
            yield Epoch(self.step // self.steps_per_epoch, self.step, losses, seconds)

    def check_finite(self) -> None:
        """Check that the losses since the last check, all weights and all moments are finite.

        Raises:
            DivergedError: a number is infinite or NaN.
        """
        self._losses.check_finite(self.step)
        require_finite_state(self._state(), self.step)

    def state_dict(self) -> dict[str, Tensor]:
        """Return weights and optimizer state by name: `machine.…`, `optimizer.generative.…`.

        In the middle of an epoch, `epoch.losses` holds the losses of its steps, `[steps, names]`. The other tensors are
        not copies. These tensors and `step` suffice to resume a run.
        """
        return self._state() | self._losses.state_dict()

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the tensors that :meth:`state_dict` returned, in place. To resume a run, set `step` as well.

        Raises:
            KeyError: a tensor is missing. In this case, no tensor is modified.
        """
        own = self._state()
        found = {name: tensors[name] for name in own}
        for name, tensor in own.items():
            tensor.copy_(found[name])
        self._losses = Losses(self.take_step.names, tensors)

    def _state(self) -> dict[str, Tensor]:
        tensors = {f"machine.{name}": value for name, value in self.machine.state_dict().items()}
        for of, descent in self.take_step.descents.items():
            tensors |= {f"optimizer.{of}.{name}": value for name, value in descent.state()}
        return tensors
