"""Define the two tiers of tests, the device fixture, and a seed for each test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from wakesleep_ext import _C

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread per worker, and per process that it starts
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="also run the tests marked thorough")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the thorough tier, unless `make test-thorough` asks for it."""
    if config.option.thorough:
        return
    thorough = [item for item in items if item.get_closest_marker("thorough")]
    if thorough:
        config.hook.pytest_deselected(items=thorough)
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.option.thorough:
        terminalreporter.write_line("Everyday tests only; --thorough or `make test-thorough` runs all.")


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Each device of this computer."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def small_chunks() -> Iterator[None]:
    """Limit the chunks of layers and heads to 1 MiB, for any device and number of threads."""
    _C.set_chunk_mib(1)
    yield
    _C.set_chunk_mib(None)
