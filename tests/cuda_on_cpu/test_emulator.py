"""The emulation runs correct kernels and reports errors in wrong ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulation import SANITIZE, run_case, schedule

pytestmark = pytest.mark.source_tree


@pytest.fixture(autouse=True, params=["in order", "shuffled"])
def _schedule(request: pytest.FixtureRequest) -> None:
    schedule(shuffled=request.param == "shuffled")


X = torch.randn(64, generator=torch.Generator().manual_seed(0))


def test_barriers() -> None:
    assert torch.equal(run_case("reverse", X), X.flip(0))
    assert torch.equal(run_case("reverse_twice", X), X)


@pytest.mark.parametrize("name", ["reverse", "reverse_twice"])
def test_a_missing_barrier_shows(name: str) -> None:
    assert not torch.equal(run_case(f"{name}_without_barrier", X), run_case(name, X))


def test_shuffles() -> None:
    sums = X.view(8, 8).double().sum(1).repeat_interleave(8)
    torch.testing.assert_close(run_case("sum_of_teams", X).double(), sums)


def test_votes() -> None:
    for x in (X, X.abs(), -X.abs()):
        of_warp = (x > 0).view(2, 32)
        expected = 1 * of_warp.any(1) + 2 * of_warp.all(1) + 4
        assert run_case("votes", x).tolist() == (expected.repeat_interleave(32) + 8 * (x > 0)).tolist()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divergent_barrier", r"deadlock in block 0: thread 0 waits at a barrier for threads that have returned"),
        ("shuffle_of_others", r"lane \d+ takes part in a shuffle or vote whose mask excludes it"),
        ("shuffle_beyond_members", r"a shuffle reads lane \d+, which is not among its members"),
        ("misaligned", r"misaligned address: 16 bytes at 0x"),
    ],
)
def test_errors_are_noticed(name: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run_case(name, X)
    assert torch.equal(run_case("reverse", X), X.flip(0))  # and nothing is left behind


@pytest.mark.skipif(not SANITIZE, reason="built without sanitizers")
def test_a_load_past_the_end_is_noticed() -> None:
    code = "import emulation, test_emulator; emulation.run_case('past_the_end', test_emulator.X)"
    here = Path(__file__).parent
    path = {**os.environ, "PYTHONPATH": str(here.parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=here, env=path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
