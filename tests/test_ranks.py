"""Check that several processes train the weights that one process trains, and stop and resume together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from wakesleep_ext.helmholtz.config import ModelConfig
from wakesleep_ext.helmholtz.models import HelmholtzMachine
from wakesleep_ext.training import checkpoint
from wakesleep_ext.training.config import TrainConfig
from wakesleep_ext.training.data import Images
from wakesleep_ext.training.ranks import ALONE, Ranks, RanksDifferError
from wakesleep_ext.training.trainer import Trainer

IMAGES = Images(
    torch.randint(256, (30, 12), generator=torch.Generator().manual_seed(2)).to(torch.uint8), white=255, shape=(3, 4)
)
CASES: list[dict[str, Any]] = [
    {"epochs": 5},
    {"latents": "bernoulli", "learning_rate_decay": 0.1, "sleep_warm_up": 1},
    {"objective": "reweighted-wake-sleep", "num_samples": 3, "defensive_fraction": 0.2, "num_dreams": 7},
    {"objective": "reweighted-wake-sleep", "num_samples": 3, "sleep_weight": 0.0, "phi_gradient": "dreg"},
    {"objective": "iwae", "num_samples": 2, "replay": False},
    {"objective": "vimco", "num_samples": 2},
]


def train(ranks: Ranks, latents: str = "gaussian", **config: Any) -> tuple[Tensor, Tensor]:
    """Return the losses of the last epoch, and the weights after it. The batch of nine is not even."""
    torch.manual_seed(0)
    model = ModelConfig(12, (3, 2), (9,), (8,), (7,), latents)  # type: ignore[arg-type]
    machine = HelmholtzMachine.from_config(model, IMAGES.mean()).double()
    trainer = Trainer(machine, IMAGES, TrainConfig(**{"batch_size": 9, "epochs": 3, **config}), ranks)
    *_, last = trainer.epochs()
    assert trainer.take_step.replays[True].is_replayed is (True if trainer.config.replay else None)
    ranks.require_equal(trainer.state_dict())
    return torch.tensor([*last.losses.values()]), torch.cat([p.detach().flatten() for p in machine.parameters()])


def train_as_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    ranks = Ranks(rank, 2)
    results = [train(ranks, **case) for case in CASES]
    torch.save(results, f"{folder}/{rank}.pt")
    if rank == 1:
        results[0][1][3] += 1e-12
    try:
        ranks.require_equal({"weights": results[0][1]})
    except RanksDifferError as error:
        Path(folder, f"{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


def test_two_ranks_train_what_one_process_trains(tmp_path: Path) -> None:
    """Up to rounding. The steps are replayed, with the messages between the ranks inside the recording."""
    multiprocessing.spawn(train_as_rank, (str(tmp_path),), nprocs=2)
    of_ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for case, one, other in zip(CASES, *of_ranks, strict=True):
        losses, weights = train(ALONE, **case)
        assert torch.equal(one[1], other[1])
        assert torch.equal(one[0], other[0])
        torch.testing.assert_close(one[0], losses, rtol=1e-9, atol=1e-9, msg=str(case))
        torch.testing.assert_close(one[1], weights, rtol=1e-9, atol=1e-9, msg=str(case))
    for rank in range(2):  # weights that differ by a rounding error are found
        told = (tmp_path / f"{rank}.txt").read_text()
        assert told == f"rank {rank} of 2: the weights of the ranks are not equal"


def test_rows_are_shared_without_a_gap() -> None:
    rows = [Ranks(rank, 3).rows(10) for rank in range(3)]
    assert [index for part in rows for index in range(10)[part]] == list(range(10))
    with pytest.raises(ValueError, match="at least one row for each of 3 ranks, got 2 rows"):
        Ranks(0, 3).rows(2)


# ---- runs that stop at any moment ------------------------------------------------------------------------------------

OBJECTIVES = {
    "plain": [],
    "reweighted": ["--objective", "reweighted-wake-sleep", "--num-samples", "2"],
}
STEPS = 8 * 60


class Runs:
    """Trains runs on small images in processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "stripes.npz"
        rng = np.random.default_rng(0)
        images = np.repeat(rng.integers(256, size=(500, 6, 1), dtype=np.uint8), 5, axis=2)
        np.savez(self.data, x_train=images[:480], x_test=images[480:])
        self.options = ["--data", str(self.data), "--device", "cpu", "--latent", "3", "--recognition-hidden", "8"]
        self.options += ["--generative-hidden", "8", "--epochs", "8", "--batch-size", "8", "--bound-samples", "2"]

    def start(self, run: Path, ranks: int, *flags: str) -> subprocess.Popen[str]:
        """Start a run, or resume it if it has begun."""
        has_begun = (run / "checkpoint.safetensors").exists()
        command = ["resume", str(run)] if has_begun else ["train", *self.options, *flags, "--out", str(run)]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] * (ranks > 1)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, *launcher, "-m", "wakesleep_ext", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )

    def finish(self, run: Path, ranks: int, *flags: str) -> None:
        process = self.start(run, ranks, *flags)
        told, _ = process.communicate(timeout=400)
        assert process.returncode == 0, told

    def stop(self, run: Path, number: signal.Signals, delay: float, *flags: str) -> tuple[int, str]:
        """Start or resume a run, and send it a signal some seconds after it has begun to train."""
        process = self.start(run, 1, *flags)
        assert process.stdout is not None
        told = ""
        while "step/s" not in told and process.poll() is None:
            told += process.stdout.read(1)
        time.sleep(delay)
        process.send_signal(number)
        rest, _ = process.communicate(timeout=400)
        return process.returncode, told + rest


def contents(run: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]], str]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"]
    return checkpoint.load(run / "checkpoint.safetensors").tensors, records, (run / "evaluation.json").read_text()


def assert_same(run: Path, whole: Path) -> None:
    (state, *others), (expected, *expected_others) = contents(run), contents(whole)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert others == expected_others


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module", params=OBJECTIVES)
def whole(request: pytest.FixtureRequest, runs: Runs) -> tuple[Path, list[str]]:
    """A run that nothing interrupts, and its flags."""
    run, flags = runs.folder / request.param, OBJECTIVES[request.param]
    runs.finish(run, 1, *flags)
    return run, flags


@pytest.mark.thorough
@pytest.mark.parametrize(("number", "times"), [(signal.SIGKILL, 13), (signal.SIGTERM, 10), (signal.SIGINT, 5)])
def test_a_run_survives_signals_at_random_moments(
    runs: Runs, whole: tuple[Path, list[str]], tmp_path: Path, number: signal.Signals, times: int
) -> None:
    """Each interrupted run resumes to the same bits. A signal that asks loses no step, and leaves no traceback."""
    run, (expected, flags) = tmp_path / "run", whole
    rng = np.random.default_rng(number)
    for _ in range(times):
        status, told = runs.stop(run, number, rng.uniform(0, 0.6), *flags)
        assert "Traceback" not in told
        if number != signal.SIGKILL and status == 128 + number:
            step = int(told.rpartition(" after step ")[2].partition(";")[0])
            assert checkpoint.load(run / "checkpoint.safetensors").description["step"] == step
        if status == 0:  # it ended before the signal came
            assert_same(run, expected)
            subprocess.run(["rm", "-r", str(run)], check=True)
    if (run / "checkpoint.safetensors").exists() or not run.exists():
        runs.finish(run, 1, *flags)
    assert_same(run, expected)


@pytest.mark.thorough
def test_a_signal_to_one_rank_stops_both_and_both_resume(
    runs: Runs, whole: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Two ranks stop in the middle of an epoch and resume to the bits of two ranks that nothing interrupts.

    They also resume as one process, to the same weights up to rounding.
    """
    expected, flags = whole
    both, run = tmp_path / "both", tmp_path / "run"
    runs.finish(both, 2, *flags)
    process = runs.start(run, 2, *flags)
    assert process.stdout is not None
    told = ""
    while "step/s" not in told:
        told += process.stdout.read(1)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(workers.stdout.split()[-1]), signal.SIGTERM)  # the last one is not rank 0
    rest, _ = process.communicate(timeout=400)
    assert rest.count("stopped by SIGTERM after step ") == 2, told + rest
    stopped_at = checkpoint.load(run / "checkpoint.safetensors").description["step"]
    assert 0 < stopped_at < STEPS
    alone = tmp_path / "alone"
    subprocess.run(["cp", "-r", str(run), str(alone)], check=True)
    runs.finish(run, 2)
    assert_same(run, both)
    runs.finish(alone, 1)
    for name, value in contents(expected)[0].items():
        torch.testing.assert_close(contents(alone)[0][name], value, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(contents(both)[0][name], value, rtol=1e-2, atol=1e-3)
    assert checkpoint.load(both / "checkpoint.safetensors").description["made_with"]["ranks"] == 2
