"""Describe what a run computes with. The bits of its results depend on versions, threads and ranks."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from wakesleep_ext import __version__
from wakesleep_ext.info import commit_of


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


@cache
def _commit() -> tuple[str | None, bool | None]:
    return commit_of(Path(__file__).resolve().parents[2])
