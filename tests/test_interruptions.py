"""Check that runs resume to the same bits after signals at random moments."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from wakesleep_ext import cli
from wakesleep_ext.training import checkpoint

OBJECTIVES = {
    "plain": ["--steps-per-replay", "7"],
    "reweighted": ["--objective", "reweighted-wake-sleep", "--num-samples", "2"],
}
EPOCHS, STEPS_PER_EPOCH = 8, 60

FORKS = get_context("forkserver")  # a process that has imported the package, so that a run starts at once
FORKS.set_forkserver_preload([__name__, "wakesleep_ext.training.run", "wakesleep_ext.report.pictures"])


def train(command: list[str], log: Path) -> None:
    """Run a command, without the pictures at its end."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    torch.set_num_threads(1)
    from wakesleep_ext.report import pictures

    pictures.draw_run = lambda *arguments: None  # type: ignore[assignment]
    sys.exit(cli.main(command))


class Runs:
    """Trains runs on small images."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, data = folder, folder / "log", folder / "stripes.npz"
        rng = np.random.default_rng(0)
        images = np.repeat(rng.integers(256, size=(500, 6, 1), dtype=np.uint8), 5, axis=2)
        np.savez(data, x_train=images[:480], x_test=images[480:])
        self._options = ["--data", str(data), "--device", "cpu", "--latent", "3", "--recognition-hidden", "8"]
        self._options += ["--generative-hidden", "8", "--batch-size", "8", "--bound-samples", "2"]

    def command(self, run: Path, *flags: str) -> list[str]:
        """Return the command that starts a run, or resumes it if it has begun."""
        if (run / "checkpoint.safetensors").exists():
            return ["resume", str(run)]
        return ["train", *self._options, "--epochs", str(EPOCHS), *flags, "--out", str(run)]

    def start(self, run: Path, *flags: str) -> BaseProcess:
        self.log.write_text("")
        process = FORKS.Process(target=train, args=(self.command(run, *flags), self.log))
        process.start()
        return process

    def finish(self, run: Path, *flags: str) -> None:
        process = self.start(run, *flags)
        process.join()
        assert process.exitcode == 0, self.log.read_text()

    def stop(self, run: Path, number: signal.Signals, delay: float, *flags: str) -> tuple[int, str]:
        """Start or resume a run, and send it a signal some seconds after its training has begun."""
        process = self.start(run, *flags)
        wait_for(lambda: "Training" in self.log.read_text() or not process.is_alive())
        time.sleep(delay)
        assert process.pid is not None
        if process.is_alive():
            os.kill(process.pid, number)
        process.join()
        assert process.exitcode is not None
        return process.exitcode, self.log.read_text()


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


def contents(run: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]], str]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"]
    return checkpoint.load(run / "checkpoint.safetensors").tensors, records, (run / "evaluation.json").read_text()


def assert_same(run: Path, whole: Path) -> None:
    """Check that two runs have the same weights, moments, metrics and evaluation, bit for bit."""
    (state, *others), (expected, *expected_others) = contents(run), contents(whole)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert others == expected_others


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module", params=[pytest.param("plain", marks=pytest.mark.thorough), "reweighted"])
def whole(request: pytest.FixtureRequest, runs: Runs) -> tuple[Path, list[str]]:
    """A run that nothing interrupts, and its flags."""
    run, flags = runs.folder / request.param, OBJECTIVES[request.param]
    runs.finish(run, *flags)
    return run, flags


@pytest.mark.parametrize(
    ("number", "times"),
    [
        (signal.SIGKILL, 1),
        *(
            pytest.param(number, times, marks=pytest.mark.thorough)
            for number, times in ((signal.SIGKILL, 13), (signal.SIGTERM, 10), (signal.SIGINT, 5))
        ),
    ],
)
def test_a_run_resumes_to_the_same_bits_after_signals_at_random_moments(
    runs: Runs, whole: tuple[Path, list[str]], tmp_path: Path, number: signal.Signals, times: int
) -> None:
    """A signal that asks loses no step, and leaves no traceback."""
    run, (expected, flags) = tmp_path / "run", whole
    rng = np.random.default_rng(number)
    for _ in range(times):
        status, told = runs.stop(run, number, rng.uniform(0, 0.5), *flags)
        assert "Traceback" not in told
        if " after step " in told:
            step = int(told.rpartition(" after step ")[2].partition(";")[0])
            assert checkpoint.load(run / "checkpoint.safetensors").description["step"] == step
            assert status == 128 + number
        if status == 0:  # it ended before the signal came
            assert_same(run, expected)
            shutil.rmtree(run)
    runs.finish(run, *flags)
    assert_same(run, expected)


def launch(command: list[str]) -> subprocess.Popen[str]:
    """Run a command with two ranks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*torchrun, "-m", "wakesleep_ext", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.thorough
def test_a_signal_to_one_rank_stops_both_and_both_resume(
    runs: Runs, whole: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Two ranks stop in the middle of an epoch and resume to the bits of two ranks that nothing interrupts.

    They also resume as one process, to the same weights up to rounding.
    """
    expected, flags = whole
    both, run = tmp_path / "both", tmp_path / "run"
    launch(runs.command(both, *flags)).communicate()
    process = launch(runs.command(run, *flags))
    assert process.stdout is not None
    told = ""
    while "step/s" not in told:
        told += (character := process.stdout.read(1))
        assert character, told  # the process has ended
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(workers.stdout.split()[-1]), signal.SIGTERM)  # the last one is not rank 0
    rest, _ = process.communicate()
    assert rest.count("stopped by SIGTERM after step ") == 2, told + rest
    stopped_at = checkpoint.load(run / "checkpoint.safetensors").description["step"]
    assert 0 < stopped_at < EPOCHS * STEPS_PER_EPOCH
    alone = tmp_path / "alone"
    shutil.copytree(run, alone)
    told, _ = launch(runs.command(run)).communicate()
    assert (run / "evaluation.json").exists(), told
    assert_same(run, both)
    runs.finish(alone)
    for name, value in contents(expected)[0].items():
        torch.testing.assert_close(contents(alone)[0][name], value, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(contents(both)[0][name], value, rtol=1e-2, atol=1e-3)
    assert checkpoint.load(both / "checkpoint.safetensors").description["made_with"]["ranks"] == 2
