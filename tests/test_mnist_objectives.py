"""Check that the MNIST table is made correctly, using smaller images, and that it is up to date."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import checkout
import numpy as np
import pytest
from checkout import ROOT

from wakesleep_ext import cli

RESULTS = ROOT / "benchmarks/results/mnist"

pytestmark = pytest.mark.source_tree


@pytest.fixture
def objectives() -> Any:
    return checkout.load("mnist_objectives", "scripts")


def test_every_objective_is_trained_once_and_told_with_its_command(
    objectives: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    data = tmp_path / "data.npz"
    images = rng.integers(256, size=(60, 3, 4), dtype=np.uint8)
    np.savez(data, x_train=images[:40], x_test=images[40:])
    small = "--epochs 2 --bound-samples 3 --latent 2 --recognition-hidden 4 --generative-hidden 4 --device cpu"
    monkeypatch.setattr(objectives, "PROTOCOL", f"--recipe mnist {small}")
    arguments = data, tmp_path / "runs", (3,), tmp_path / "results"
    objectives.train(*arguments)
    records = json.loads((tmp_path / "results/results.json").read_text())
    page = (tmp_path / "results/README.md").read_text()
    assert (tmp_path / "results/curves.png").stat().st_size > 10_000
    assert [record["objective"] for record in records] == list(objectives.OBJECTIVES)
    for record in records:
        assert len(record["test_elbo"]) == 2
        assert record["machine"]["command"] in page
        assert f"{record['nll']:.2f}" in objectives.summary(records)
        run = tmp_path / "runs" / objectives.folder(record["objective"], 3)
        training = json.loads((run / "config.json").read_text())["training"]
        assert training["objective"] in record["machine"]["command"]
        assert training["seed"] == 3

    monkeypatch.setattr(cli, "main", None)  # what is there already is not trained again
    shutil.rmtree(tmp_path / "runs")
    objectives.train(*arguments)


def test_the_committed_table_is_that_of_the_results(objectives: Any) -> None:
    records = json.loads((RESULTS / "results.json").read_text())
    assert (RESULTS / "README.md").read_text() == objectives.page(records), "run `make mnist`"
    assert {record["objective"] for record in records} == set(objectives.OBJECTIVES)
    assert len({record["seed"] for record in records}) >= 2


def test_objectives_are_compared_by_seed_within_one_version(objectives: Any) -> None:
    def record(objective: str, seed: int, nll: float, version: str = "2") -> dict[str, Any]:
        return {"objective": objective, "seed": seed, "nll": nll, "machine": {"wakesleep_ext": version}}

    records = [record("a", 0, 5.0), record("a", 1, 6.0), record("a", 2, 7.0), record("a", 3, 1.0)]
    records += [record("b", 1, 5.5), record("b", 2, 7.5), record("b", 3, 1.0, "1")]
    assert objectives.paired_differences(records, "a", "b") == [0.5, -0.5]
