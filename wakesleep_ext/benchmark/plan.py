"""What a benchmark is asked to measure. Importing it is cheap: it does without torch."""

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
    """What to measure, where, and beside whom."""

    suite: Literal["ops", "step"] = "ops"
    """What to measure: the ops, or whole training steps."""
    op: str = "*"
    """Which of it: the name of an op or a net, or a pattern such as "gaussian_*"."""
    device: Device = "auto"
    """Where to compute; auto takes the GPU if there is one."""
    threads: int | None = None
    """CPU threads, the same for all; as many as torch takes by default."""
    quick: bool = False
    """A few cases only, in a minute or so; all of them take six or more."""
    candidates: tuple[str, ...] = ()
    """Whom to measure, of fused, eager, distributions, compile, and for a step products; all by default."""

    def command(self, device: torch.device, threads: int) -> str:
        """What takes the same figures again on the same machine."""
        words = ["wakesleep", "bench", "--device", device.type, "--threads", str(threads)]
        words += ["--suite", self.suite] if self.suite != "ops" else []
        words += ["--op", self.op] if self.op != "*" else []
        words += ["--quick"] if self.quick else []
        words += ["--candidates", *self.candidates] if self.candidates else []
        capability = os.environ.get("ATEN_CPU_CAPABILITY")
        return (f"ATEN_CPU_CAPABILITY={capability} " if capability else "") + shlex.join(words)
