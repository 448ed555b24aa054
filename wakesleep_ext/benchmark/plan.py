"""The options of a benchmark. Importing this module does not import torch."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from wakesleep_ext.usage import Device

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Plan:
    """The cases and implementations to measure, and the device."""

    suite: Literal["ops", "step"] = "ops"
    """Measure single ops, or whole training steps."""
    op: str = "*"
    """Name of the op or network to measure, or a pattern such as "gaussian_*"."""
    device: Device = "auto"
    """Device to measure on; auto is the GPU if there is one."""
    threads: int | None = None
    """CPU threads for every implementation; torch's default if not given."""
    quick: bool = False
    """Measure only a few cases, which takes about two minutes. All cases take 20 minutes or more."""
    candidates: tuple[str, ...] = ()
    """Implementations to measure; all by default. For ops: fused, eager, distributions, compile, "torch fused" (Adam).
    For steps: fused, jax, eager, distributions, "compiled step", max-autotune, products (only the GEMMs), and on a GPU
    "eager in a graph" and "compiled in a graph"."""

    def command(self, device: torch.device, threads: int) -> str:
        """Return the command that repeats the measurement on the same computer."""
        words = ["wakesleep", "bench", "--device", device.type, "--threads", str(threads)]
        words += ["--suite", self.suite] if self.suite != "ops" else []
        words += ["--op", self.op] if self.op != "*" else []
        words += ["--quick"] if self.quick else []
        words += ["--candidates", *self.candidates] if self.candidates else []
        capability = os.environ.get("ATEN_CPU_CAPABILITY")
        return (f"ATEN_CPU_CAPABILITY={capability} " if capability else "") + shlex.join(words)
