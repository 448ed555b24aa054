"""Runs the CUDA kernels of the tests in this folder on the CPU. Everyday tests use the shuffled schedule only."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cases import thorough
from emulation import cuda_kernels, schedule


@pytest.fixture(params=[thorough("in order"), "shuffled"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU, running the CUDA kernels. In the shuffled schedule, a block processes several rows."""
    shuffled = request.param == "shuffled"
    schedule(shuffled=shuffled, max_blocks=2 if shuffled else 0)
    with cuda_kernels():
        yield "cpu"
    schedule()
