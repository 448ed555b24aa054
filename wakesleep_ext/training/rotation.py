"""Keep three checkpoints of a run: the last one, the one before it, and the one with the best weights.

- `checkpoint.safetensors` holds weights, optimizer state and step number.
- `previous.safetensors` is the checkpoint before it, in case that one is damaged.
- `best.safetensors` holds the weights at the end of the epoch with the highest test ELBO per image.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from wakesleep_ext._files import keep
from wakesleep_ext.helmholtz.models import HelmholtzMachine
from wakesleep_ext.training import checkpoint
from wakesleep_ext.training.checkpoint import Checkpoint, CheckpointError
from wakesleep_ext.training.divergence import DivergedError
from wakesleep_ext.training.provenance import made_with
from wakesleep_ext.training.run_config import RunConfig, RunError

if TYPE_CHECKING:
    from wakesleep_ext.training.trainer import Trainer

LAST, PREVIOUS, BEST = FILES = ("checkpoint.safetensors", "previous.safetensors", "best.safetensors")

Which = Literal["last", "best"]

_SECONDS_BETWEEN_SAVES = 10.0
_SAVING = 0.03
"""Maximum fraction of the time that is spent on saving."""


def has_begun(folder: Path) -> bool:
    """Return True if a folder contains a run that can be resumed."""
    return any((folder / name).exists() for name in (LAST, PREVIOUS))


def load(folder: Path, which: Which = "last") -> tuple[Path, Checkpoint]:
    """Load a checkpoint, and return its path too. If the last one is damaged, load the one before it and say so.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    return checkpoint.load_first([folder / name for name in ([BEST] if which == "best" else [LAST, PREVIOUS])])


def restore(trainer: Trainer, path: Path, held: Checkpoint, step: int) -> None:
    """Give a trainer the state that a checkpoint holds.

    Raises:
        CheckpointError: the checkpoint lacks a part of the state.
    """
    try:
        trainer.load_state_dict(held.tensors)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(path, f"does not hold the state of a trainer: {error!r}") from error
    trainer.step, trainer.seconds = step, held.description.get("seconds", 0.0)
    if len(held.tensors.get("epoch.losses", ())) != step % trainer.steps_per_epoch:
        raise CheckpointError(path, "does not hold the losses of its incomplete epoch")


class Rotation:
    """Saves the checkpoints of a run.

    Args:
        folder: folder of the run.
        config: config of the run, which every checkpoint contains.
        saved_step: step of the last checkpoint that is already saved.
    """

    def __init__(self, folder: Path, config: RunConfig, saved_step: int = 0) -> None:
        self.path, self.saved_step = folder / LAST, saved_step
        self._config = config
        self._due = time.monotonic() + _SECONDS_BETWEEN_SAVES
        self._best: tuple[dict[str, Tensor], int] | None = None

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Name the last good checkpoint in an error that ends the run while the context is active.

        Raises:
            DivergedError: the run has diverged.
            RunError: a file cannot be written.
        """
        try:
            yield
        except (DivergedError, OSError) as error:
            reason = f"{error}; the last good checkpoint, of step {self.saved_step}, is {self.path}"
            if isinstance(error, OSError):
                raise RunError(self.path.parent, reason) from error
            raise DivergedError(reason) from error

    @property
    def is_due(self) -> bool:
        """True if enough time has passed since the last save."""
        return time.monotonic() >= self._due

    def begin(self, trainer: Trainer) -> None:
        """Save checkpoint 0."""
        self._write(LAST, trainer, trainer.state_dict(), step=0)

    def promote(self, path: Path) -> None:
        """Make the checkpoint that was loaded the last one. Otherwise, the next save would keep a damaged one."""
        if path != self.path:
            keep(path, self.path)

    def hold_best(self, machine: HelmholtzMachine, step: int) -> None:
        """Copy the weights, the best so far. They are written when the run is saved, which is soon enough to resume."""
        self._best = {f"machine.{name}": value.clone() for name, value in machine.state_dict().items()}, step

    def save(self, trainer: Trainer) -> None:
        """Save the state of the trainer, and the best weights if they are new. Only rank 0 writes.

        Raises:
            DivergedError: a loss, a weight or a moment is not finite. No file changes.
        """
        start = time.monotonic()
        trainer.check_finite()
        if self._best is not None:
            tensors, step = self._best
            self._write(BEST, trainer, tensors, step=step)
            self._best = None
        if trainer.step != self.saved_step:
            if trainer.ranks.rank == 0:
                keep(self.path, self.path.with_name(PREVIOUS))
            self._write(LAST, trainer, trainer.state_dict(), step=trainer.step, seconds=trainer.seconds)
            self.saved_step = trainer.step
        end = time.monotonic()
        self._due = end + max(_SECONDS_BETWEEN_SAVES, (end - start) / _SAVING)

    def _write(self, name: str, trainer: Trainer, tensors: Mapping[str, Tensor], **state: float) -> None:
        if trainer.ranks.rank > 0:
            return
        description = asdict(self._config) | {"made_with": made_with(trainer.ranks.count)} | state
        checkpoint.save(self.path.with_name(name), tensors, description)
