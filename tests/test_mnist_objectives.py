"""Check that the MNIST table is made correctly, using smaller images, and that it is up to date."""

from __future__ import annotations

import json
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
    monkeypatch.setattr(objectives.write, "__defaults__", (tmp_path / "results",))
    objectives.train(data, tmp_path / "runs", (3,))
    results = json.loads((tmp_path / "results/results.json").read_text())
    page = (tmp_path / "results/README.md").read_text()
    assert (tmp_path / "results/curves.png").stat().st_size > 10_000
    assert [record["objective"] for record in results["records"]] == list(objectives.OBJECTIVES)
    for record in results["records"]:
        assert len(record["test_elbo"]) == 2
        assert record["command"] in page
        assert f"{record['nll']:.2f}" in objectives.summary(results)
        run = tmp_path / "runs" / objectives.folder(record["objective"], 3)
        training = json.loads((run / "config.json").read_text())["training"]
        assert training["objective"] in record["command"]
        assert training["seed"] == 3

    monkeypatch.setattr(cli, "main", None)  # what is there already is not trained again
    objectives.train(data, tmp_path / "runs", (3,))


def test_the_committed_table_is_that_of_the_results(objectives: Any) -> None:
    results = json.loads((RESULTS / "results.json").read_text())
    assert (RESULTS / "README.md").read_text() == objectives.page(results), "run `make mnist`"
    assert {record["objective"] for record in results["records"]} == set(objectives.OBJECTIVES)
    assert len({record["seed"] for record in results["records"]}) >= 2
