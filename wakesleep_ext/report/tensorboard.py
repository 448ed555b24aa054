"""Show a training run in TensorBoard: `wakesleep train --log tensorboard`.

A logger is a module of this package with a function `follow`. It takes the folder of the run, and is a context manager
of a function that receives the record of each epoch. To add a logger, write such a module, and add its name to
`wakesleep_ext.usage.Log`. The import of the module fails if a package is missing, which ends the command before the
training. A resumed run yields the records of its earlier epochs again, so a logger starts afresh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


@contextmanager
def follow(folder: Path) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Write the losses, the test ELBO and the seconds of each epoch to event files in `tensorboard` in the folder."""
    events = folder / "tensorboard"
    for earlier in events.glob("events.out.tfevents.*"):
        earlier.unlink()
    with SummaryWriter(str(events)) as writer:

        def log(record: Mapping[str, float]) -> None:
            for name in record.keys() - {"epoch", "step"}:
                writer.add_scalar(name, record[name], int(record["step"]))
            writer.flush()

        yield log
