"""Describe what a run computes with. The bits of its results depend on versions, threads and ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from wakesleep_ext import __version__
from wakesleep_ext.info import commit_of
from wakesleep_ext.training.checkpoint import Checkpoint
from wakesleep_ext.training.ranks import Ranks
from wakesleep_ext.usage import Threads, on_threads

_MATTERS = ("wakesleep_ext", "torch", "threads", "ranks")
"""What the bits of the results depend on. The commit is left out, because it changes with every edit of a checkout."""

_log = logging.getLogger(__name__)


def made_with(ranks: int) -> dict[str, Any]:
    """Return what a checkpoint is written with, as JSON: versions, threads, and the number of ranks."""
    commit, modified = _commit()
    return {
        "wakesleep_ext": __version__,
        "torch": torch.__version__,
        "commit": commit,
        "modified": modified,
        "threads": torch.get_num_threads(),
        "ranks": ranks,
    }


@contextmanager
def continued(path: Path, held: Checkpoint, ranks: Ranks, threads: Threads) -> Iterator[None]:
    """Use the number of threads of a checkpoint while the context is active.

    Logs a warning if this number, the versions or the number of ranks are not those that the checkpoint was made with.

    Args:
        path: path of the checkpoint.
        held: the checkpoint.
        ranks: the processes that continue the run.
        threads: number of threads. `auto` is that of the checkpoint, but at most the number that torch uses, because
            this computer may have fewer cores.
    """
    before, most = held.description.get("made_with", {}), torch.get_num_threads()
    with on_threads(min(most, before.get("threads", most)) if threads == "auto" else threads):
        now = made_with(ranks.count)
        changed = [name for name in _MATTERS if before.get(name, now[name]) != now[name]]
        if changed and ranks.rank == 0:
            was, is_now = (", ".join(f"{name} {of[name]}" for name in changed) for of in (before, now))
            _log.warning(
                "%s was made with %s. The run continues with %s, so it may round differently", path, was, is_now
            )
        yield


@cache
def _commit() -> tuple[str | None, bool | None]:
    return commit_of(Path(__file__).resolve().parents[2])
