"""Check the choice of the number of threads, and that measuring it does not change a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from wakesleep_ext import cli
from wakesleep_ext.helmholtz.config import ModelConfig
from wakesleep_ext.helmholtz.models import HelmholtzMachine
from wakesleep_ext.training import checkpoint, threads
from wakesleep_ext.training.config import TrainConfig
from wakesleep_ext.training.data import Dataset, Images
from wakesleep_ext.training.ranks import ALONE, Ranks
from wakesleep_ext.training.run import Run
from wakesleep_ext.training.step import Step
from wakesleep_ext.training.threads import choose
from wakesleep_ext.training.trainer import Trainer
from wakesleep_ext.usage import on_threads

PIXELS = np.random.default_rng(0).integers(256, size=(30, 6, 5), dtype=np.uint8)
IMAGES = Images.of(PIXELS)
SMALL = [
    "--latent",
    "3",
    "--recognition-hidden",
    "8",
    "--generative-hidden",
    "8",
    "--epochs",
    "1",
    "--bound-samples",
    "2",
]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure one step of each number of threads, so that busy cores do not slow down the tests."""
    monkeypatch.setattr(threads, "_SECONDS", 0.0)


def trainer(ranks: Ranks = ALONE) -> Trainer:
    torch.manual_seed(0)
    machine = HelmholtzMachine.from_config(ModelConfig(30, (3,), (8,), (8,)))
    return Trainer(machine, IMAGES, TrainConfig(epochs=1, batch_size=4, sleep_warm_up=1), ranks)


@pytest.mark.parametrize(
    ("most", "seconds", "chosen", "measured"),
    [
        (1, {1: 1.0}, 1, [1]),
        (8, {1: 1.0, 2: 0.6, 4: 0.4, 8: 0.3}, 8, [1, 2, 4, 8]),
        (6, {1: 1.0, 2: 0.6, 4: 0.4, 6: 0.3}, 6, [1, 2, 4, 6]),
        (8, {1: 1.0, 2: 0.6, 4: 0.58}, 2, [1, 2, 4]),  # the near-tie goes to fewer threads
        (64, {1: 1.0, 2: 90.0}, 1, [1, 2]),  # threads that wait for busy cores are not tried in larger numbers
    ],
)
def test_the_fastest_number_is_chosen_and_fewer_threads_if_it_makes_little_difference(
    most: int, seconds: dict[int, float], chosen: int, measured: list[int]
) -> None:
    tried = []

    def seconds_of(count: int) -> float:
        tried.append(count)
        return seconds[count]

    assert threads._fastest(seconds_of, most) == chosen
    assert tried == measured


def test_a_step_is_measured_on_each_number_of_threads_up_to_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    class Noted(Step):
        def __call__(self, index: torch.Tensor) -> torch.Tensor:
            used.append((torch.get_num_threads(), self.is_awake))
            return index

    monkeypatch.setattr(threads, "Step", Noted)
    monkeypatch.setattr(threads, "_GAIN", 1e9)  # every number is faster
    step = trainer().take_step
    with on_threads(3):
        assert choose("auto", step) == 3
        assert torch.get_num_threads() == 3
    assert used == [(count, True) for count in (1, 1, 1, 1, 2, 3)]  # also the phases that begin after a warm-up


def test_nothing_is_measured_without_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(threads, "Step")
    with on_threads(1):
        assert choose("auto", trainer().take_step) == 1
    with on_threads(2):
        assert choose(5, trainer().take_step) == 5
        assert choose("auto", trainer(Ranks(1, 2)).take_step) == 2


def test_measuring_leaves_no_trace() -> None:
    """Weights, moments, keys, step number, losses and torch's random numbers stay, as do the losses of the epoch."""
    one, other = trainer(), trainer()
    before = torch.get_rng_state()
    with on_threads(2):
        choose("auto", other.take_step)
    assert torch.equal(torch.get_rng_state(), before)
    assert (other.step, other.state_dict().keys()) == (0, one.state_dict().keys())
    assert torch.equal(other.take_step.keys.values, one.take_step.keys.values)
    assert other.take_step.replays[True, 1].is_replayed is None
    for _ in range(2):
        for name, value in one.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name
        assert [epoch.losses for epoch in one.epochs()] == [epoch.losses for epoch in other.epochs()]


def test_a_run_with_the_chosen_number_is_the_same_and_resumes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`resume` uses the number of the checkpoint, but not more threads than torch would use by itself."""
    used = []

    def train(run: Run, trainer: Trainer, dataset: Dataset, loggers: object) -> None:
        used.append(torch.get_num_threads())
        list(run.train(trainer, dataset.binary_test()))

    def main(limit: int, *command: str) -> None:
        with on_threads(limit):
            assert cli.main([*command, "--device", "cpu"]) == 0
            assert torch.get_num_threads() == limit

    monkeypatch.setattr(cli, "_finish", train)
    monkeypatch.setattr(threads, "_GAIN", 1e9)
    np.savez(tmp_path / "data.npz", x_train=PIXELS, x_test=PIXELS)
    command = ["train", "--data", str(tmp_path / "data.npz"), *SMALL, "--out"]
    main(2, *command, str(tmp_path / "auto"))
    main(1, *command, str(tmp_path / "same"), "--threads", "2")
    found, expected = (checkpoint.load(tmp_path / name / "checkpoint.safetensors") for name in ("auto", "same"))
    assert all(torch.equal(found.tensors[name], value) for name, value in expected.tensors.items())
    assert found.description["made_with"]["threads"] == 2
    for limit, flags in ((3, []), (1, []), (1, ["--threads", "4"])):
        main(limit, "resume", str(tmp_path / "auto"), *flags)
    assert used == [2, 2, 2, 1, 4]
