"""Read and write the folder of a run. Only this module knows the files in the folder and the lock.

`config.json` describes the run. The modules `rotation` and `metrics` know the checkpoints, and what a run measures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wakesleep_ext._files import locked, require_room, write_atomically
from wakesleep_ext.helmholtz.models import HelmholtzMachine
from wakesleep_ext.training import checkpoint, metrics, rotation
from wakesleep_ext.training.data import Dataset
from wakesleep_ext.training.provenance import continued
from wakesleep_ext.training.ranks import ALONE, Ranks
from wakesleep_ext.training.rotation import Rotation, Which
from wakesleep_ext.training.run_config import RunConfig, RunError, of_checkpoint
from wakesleep_ext.training.signals import Request, StoppedError
from wakesleep_ext.training.trainer import Trainer
from wakesleep_ext.usage import Threads

_CONFIG = "config.json"
_PICTURES = ("samples", "reconstructions", "curves", "evaluation")
_FILES = (_CONFIG, *rotation.FILES, *metrics.FILES, *(f"{name}.png" for name in _PICTURES))


class Run:
    """The folder of one run."""

    def __init__(self, folder: Path, config: RunConfig, step: int = 0) -> None:
        self.folder, self.config = folder, config
        self._checkpoints = Rotation(folder, config, step)

    @classmethod
    @contextmanager
    def begin(cls, folder: Path, config: RunConfig, trainer: Trainer, overwrite: bool = False) -> Iterator[Run]:
        """Start a new run: write checkpoint 0, and lock the folder for this process until the context ends.

        Args:
            overwrite: replace an existing run in the folder.

        Raises:
            FileError: the folder already holds a run, another process is writing to it, or its disk is too full for
                three checkpoints. Nothing is written then.
        """
        if trainer.ranks.rank > 0:
            yield cls(folder, config)  # rank 0 writes
            return
        require_room(folder, 3 * sum(tensor.nbytes for tensor in trainer.state_dict().values()) + 2**20)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            held = [name for name in _FILES if (folder / name).exists()]
            if held and not overwrite:
                raise RunError(
                    folder, f"already holds a run ({', '.join(held)}); choose another folder, or overwrite it"
                )
            run = cls(folder, config)
            try:
                for name in set(held) - {_CONFIG, rotation.LAST}:
                    (folder / name).unlink()
                run._checkpoints.begin(trainer)
                run._describe()
            except BaseException:
                for name in () if held else (rotation.LAST, _CONFIG):
                    (folder / name).unlink(missing_ok=True)
                raise
            yield run

    @classmethod
    @contextmanager
    def resume(
        cls,
        folder: Path,
        where: torch.device,
        ranks: Ranks = ALONE,
        data: str | None = None,
        threads: Threads = "auto",
    ) -> Iterator[tuple[Run, Trainer, Dataset]]:
        """Resume an interrupted run. Yield the run, its trainer in the state of the last checkpoint, and its data.

        Warnings are logged if the last checkpoint is damaged, so that the one before it takes its place, and if it was
        made with other versions, or other numbers of threads or ranks.

        Args:
            data: where the data of the run are now, if they have moved. The images must be the same. Later checkpoints
                name the new place.
            threads: number of CPU threads while the context is active; see :func:`.provenance.continued`.

        Raises:
            FileError: no checkpoint or the data cannot be read, the data have changed, or another process is writing to
                the folder.
        """
        is_writer = ranks.rank == 0
        with locked(folder) if is_writer else nullcontext():  # read under the lock, so that no process replaces the run
            path, held = rotation.load(folder)
            config, step = of_checkpoint(path, held)
            config, dataset = config.with_data(folder, data)
            machine = checkpoint.machine_of(path, held)
            trainer = Trainer(machine.to(where), dataset.train.to(where), config.training, ranks)
            rotation.restore(trainer, path, held, step)
            run = cls(folder, config, step if data is None else -1)  # if the data have moved, it is saved at once
            with continued(path, held, ranks, threads):
                if is_writer:
                    run._checkpoints.promote(path)
                    run._describe()
                run._checkpoints.save(trainer)
                yield run, trainer, dataset

    @classmethod
    def load(cls, folder: Path, which: Which = "last") -> tuple[Run, HelmholtzMachine]:
        """Load a run and its machine on the CPU, from the last checkpoint or the one with the highest test ELBO.

        Raises:
            CheckpointError: there is no checkpoint, or it is damaged.
        """
        path, held = rotation.load(folder, which)
        config, step = of_checkpoint(path, held)
        return cls(folder, config, step), checkpoint.machine_of(path, held)

    def load_data(self, source: str | None = None) -> Dataset:
        """Load the training data of the run, or other data of the same shape.

        Raises:
            FileError: the data cannot be read, or their images have a different shape.
        """
        return self.config.load_data(self.folder, source or self.config.data)

    def picture(self, name: str) -> Path:
        """Return the path of a picture of the run."""
        assert name in _PICTURES
        return self.folder / f"{name}.png"

    def train(
        self,
        trainer: Trainer,
        test: Tensor,
        on_step: Callable[[], object] = lambda: None,
        stop: Request = lambda: None,
    ) -> Iterator[dict[str, Any]]:
        """Train until the last epoch, or until the test ELBO stalls, and write metrics and checkpoints to the folder.

        Args:
            test: binary pixels `[N, D]`, uint8, on the trainer's device.
            on_step: called once for each step, as in :meth:`Trainer.epochs`.
            stop: called after `on_step`. If it returns a signal, the run is saved and stops, with all its ranks.

        Yields:
            The metrics of each epoch. A resumed run first yields the metrics of the epochs before its checkpoint.

        Raises:
            DivergedError: as in :meth:`Trainer.epochs`, or the test ELBO is not finite; the message names the last good
                checkpoint.
            RunError: a file cannot be written; the message names the last good checkpoint.
            StoppedError: `stop` returned a signal.
        """
        machine, is_writer = trainer.machine, trainer.ranks.rank == 0

        def after_step() -> None:
            on_step()
            if trainer.step % trainer.steps_per_epoch:  # otherwise, the metrics of the epoch come first
                self._save_if_due(trainer, stop)

        with self._checkpoints.named_in_errors():
            records = metrics.rewind(self.folder, trainer.step, is_writer)
            trainer.ranks.require_equal(trainer.state_dict())
            yield from records
            elbos = [record["test_elbo"] for record in records]
            epochs = trainer.epochs(after_step)
            while not trainer.config.has_stalled(elbos) and (epoch := next(epochs, None)):
                trainer.ranks.require_equal(machine.state_dict())
                elbo = metrics.test_elbo(machine, test, trainer.ranks)
                record = epoch.record(elbo)
                if is_writer:
                    metrics.append(self.folder, record)
                if elbo > max(elbos, default=-math.inf):
                    self._checkpoints.hold_best(machine, epoch.step)
                elbos.append(elbo)
                self._save_if_due(trainer, stop)
                yield record
            self._checkpoints.save(trainer)

    def _describe(self) -> None:
        write_atomically(self.folder / _CONFIG, json.dumps(asdict(self.config), indent=2).encode() + b"\n")

    def _save_if_due(self, trainer: Trainer, stop: Request) -> None:
        signal = trainer.ranks.agree(stop())
        if signal is not None or self._checkpoints.is_due:
            self._checkpoints.save(trainer)
        if signal is not None:
            reason = f"stopped by {signal.name} after step {trainer.step}; wakesleep resume {self.folder} continues"
            raise StoppedError(signal, reason)
