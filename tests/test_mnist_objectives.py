"""Check that the MNIST table is made correctly, using smaller images, and that it is up to date."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkout
import numpy as np
import pytest
from cases import thorough
from checkout import ROOT

from wakesleep_ext import cli

RESULTS = ROOT / "benchmarks/results/mnist"

pytestmark = pytest.mark.source_tree


@pytest.fixture
def objectives() -> Any:
    return checkout.load("mnist_objectives", "scripts")


@pytest.mark.parametrize("number", [2, thorough(100)])
def test_every_objective_is_trained_once_and_told_with_its_command(
    objectives: Any, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    data = tmp_path / "data.npz"
    images = rng.integers(256, size=(60, 3, 4), dtype=np.uint8)
    np.savez(data, x_train=images[:40], x_test=images[40:])
    small = " --epochs 2 --bound-samples 3 --latent 2 --batch-size 40 --device cpu"
    studies = [
        replace(study, protocol=study.protocol + small, objectives=dict(list(study.objectives.items())[-number:]))
        for study in objectives.STUDIES
    ]
    monkeypatch.setattr(objectives, "STUDIES", studies)
    arguments = data, tmp_path / "runs", tmp_path / "results"
    objectives.train(*arguments)
    records = json.loads((tmp_path / "results/results.json").read_text())
    page = (tmp_path / "results/README.md").read_text()
    planned = list(objectives.planned())
    assert [(record["objective"], record["seed"]) for record in records] == [run[1:] for run in planned]
    for record, (study, name, seed) in zip(records, planned, strict=True):
        assert len(record["test_elbo"]) == 2
        assert record["machine"]["command"] in page
        assert (tmp_path / f"results/{study.name}.png").stat().st_size > 10_000
        training = json.loads((tmp_path / "runs" / objectives.folder(name, seed) / "config.json").read_text())[
            "training"
        ]
        assert training["objective"] in record["machine"]["command"]
        assert training["seed"] == seed

    monkeypatch.setattr(cli, "main", None)  # what is there already is not trained again
    shutil.rmtree(tmp_path / "runs")
    objectives.train(*arguments)


def test_the_commands_of_all_runs_are_valid_and_differ(objectives: Any) -> None:
    commands = [objectives.flags(*planned) for planned in objectives.planned()]
    assert len(set(commands)) == len(commands)
    for command in commands:
        cli.parse(["train", *command.split()])


def test_the_committed_table_is_that_of_the_results(objectives: Any) -> None:
    records = json.loads((RESULTS / "results.json").read_text())
    assert (RESULTS / "README.md").read_text() == objectives.page(records), "run `make mnist`"
    assert [(record["objective"], record["seed"]) for record in records] == [run[1:] for run in objectives.planned()]


def test_objectives_are_compared_by_seed_within_one_version(objectives: Any) -> None:
    def record(objective: str, seed: int, nll: float, version: str = "2") -> dict[str, Any]:
        return {"objective": objective, "seed": seed, "nll": nll, "machine": {"wakesleep_ext": version}}

    records = [record("a", 0, 5.0), record("a", 1, 6.0), record("a", 2, 7.0), record("a", 3, 1.0)]
    records += [record("b", 1, 5.5), record("b", 2, 7.5), record("b", 3, 1.0, "1")]
    assert objectives.paired_differences(records, "a", "b") == [0.5, -0.5]
