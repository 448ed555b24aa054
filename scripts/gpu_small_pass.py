"""Run every op forward and backward on the shapes of the tests, which is small enough for a sanitizer.

Run it in the tests folder, because it imports the table of cases there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import torch

sys.path.insert(0, str(Path.cwd()))

from cases import SHAPES, Case

from wakesleep_ext import _C


def main() -> None:
    walk(SHAPES)
    _C.set_small_batch(0)  # takes the path of large batches
    _C.set_chunk_mib(0)  # in chunks of as few rows as possible
    walk(case for case in SHAPES if case.op.startswith(("linear", "mlp")))
    torch.cuda.synchronize()


def walk(cases: Iterable[Case]) -> None:
    for case in cases:
        if 70 in case.sample_shape:  # adds no new path
            continue
        for dtype in (torch.float32, torch.bfloat16):
            results = case(*case.inputs(dtype, "cuda", requires_grad=True))
            if results[0].requires_grad:
                torch.autograd.backward([result.sum() for result in results])


if __name__ == "__main__":
    main()
