"""Check the page that compares runs: it is complete, self-contained, and says what the runs say."""

import json
import re
import shlex
from dataclasses import asdict, replace

import pytest
import torch

from wakesleep_ext import cli
from wakesleep_ext.evaluation.bounds import log_likelihood_bounds
from wakesleep_ext.evaluation.importance import ImportanceWeights
from wakesleep_ext.helmholtz.config import ModelConfig
from wakesleep_ext.helmholtz.models import HelmholtzMachine
from wakesleep_ext.report.page import Compared, _log_weights, command, page
from wakesleep_ext.training.config import TrainConfig
from wakesleep_ext.training.run_config import RunConfig

MODEL = ModelConfig(12, (2, 1), (4,), (4,), (3,))
CONFIG = RunConfig("digits", "0" * 64, (3, 4), MODEL, TrainConfig(epochs=3), bound_samples=10)
RESULT = {
    "nll": 7.125,
    "elbo": -8.5,
    "kl": [1.0, 0.5],
    "bound_samples": 10,
    "active_units": [2, 1],
    "units": [2, 1],
    "energy_distance": 0.25,
}


def compared(name, config=CONFIG, result=RESULT, epochs=3):
    records = [{"epoch": i + 1, "step": i, "test_elbo": -9.0 + i, "wake_loss": 9.0 - i} for i in range(epochs)]
    torch.manual_seed(len(name))
    machine = HelmholtzMachine.from_config(config.model)
    return Compared(name, config, records, result, machine, (torch.rand(30, 12) < 0.5).byte())


@pytest.fixture(scope="module")
def html():
    other = replace(CONFIG, training=replace(CONFIG.training, objective="iwae", num_samples=5))
    return page([compared("first"), compared("<i>second</i>", other, result=None)], num_images=25, num_samples=40)


def test_the_page_refers_to_no_other_file(html):
    assert set(re.findall(r'(?:src|href)="([^"]{1,5})', html)) <= {"data:", *re.findall(r'href="(#[^"]{0,4})', html)}
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\s\"<]+", html)) <= namespaces
    assert not re.search(r"<script|@import|url\((?!#)", html)
    assert len(html) < 500_000


def test_names_are_escaped(html):
    assert "&lt;i&gt;second&lt;/i&gt;" in html
    assert "<i>" not in html


def test_a_figure_uses_no_part_of_another(html):
    """Ids are those of the whole page. Glyphs occur several times, with the same outline."""
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', html))
    parts = re.findall(r'<(?:path|clipPath) id="([^"]+)"[^<]*(?:<rect[^>]*>)?', html)
    assert used <= set(parts)
    outlines = set(re.findall(r'<path id="([^"]+)" d="([^"]+)"', html))
    clips = re.findall(r'<clipPath id="([^"]+)"', html)
    assert len({name for name, _ in outlines}) == len(outlines)
    assert len(set(clips)) == len(clips)


def test_the_table_has_the_results_or_dashes(html):
    first, second = (re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr><td>.*</tr>", html)[:2])
    assert first[1:-2] == ["wake-sleep", "3 of 3", "7.12 (K = 10)", "8.50", "1.50", "2 of 2, 1 of 1"]
    assert first[-1] == "0.2500"
    assert second[1:-2] == ["iwae", "3 of 3", "–", "7.00", "–", "–"]  # noqa: RUF001


def test_settings_are_divided_into_different_and_equal(html):
    different, equal = html.split("Settings that differ")[1].split("<details>")
    assert "<td>training objective</td><td>wake-sleep</td><td>iwae</td>" in different
    assert "<td>training num samples</td><td>1</td><td>5</td>" in different
    assert different.count("<tr>") == 3
    assert "<td>model latent</td><td>2 1</td><td>2 1</td>" in equal


def test_there_are_figures_of_every_curve(html):
    assert html.count("<svg") == html.count("</svg>") == 4  # ELBO, wake loss, weights, sample sizes
    assert html.count("data:image/png;base64,iVBOR") == 4


def test_a_run_without_an_epoch_has_a_page():
    text = page([compared("new", result=None, epochs=0)], num_images=3, num_samples=5)
    assert "0 of 3" in text
    assert text.count("<svg") == 2


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, train_array="a b", bound_samples=3),
        replace(CONFIG, training=TrainConfig("reweighted-wake-sleep", 0.25, num_dreams=7, replay=False, patience=4)),
        replace(CONFIG, training=TrainConfig(adam_betas=(0.5, 0.75), adam_epsilon=1e-7)),
        replace(CONFIG, model=ModelConfig(64, (3, 2), (), (5, 6), latents="bernoulli", activation="relu")),
    ],
)
def test_the_command_makes_the_run_again(tmp_path, monkeypatch, config):
    monkeypatch.setattr(cli, "_finish", lambda *run: None)
    _, *arguments = shlex.split(command(config))
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    made = json.loads((tmp_path / "config.json").read_text())
    wanted = json.loads(json.dumps(asdict(config)))
    facts = ("data_sha256", "image_shape")
    assert {k: v for k, v in made.items() if k not in facts} == {
        **{k: v for k, v in wanted.items() if k not in facts},
        "model": wanted["model"] | {"observed": 64},
    }


def test_the_weights_are_those_of_the_bound():
    run = compared("run")
    log_w = _log_weights(run.machine, run.test, 50, seed=3)
    bounds = log_likelihood_bounds(
        run.machine.recognition, run.machine.generative, run.test, 50, seed=3, chunk_rows=50 * 20
    )
    weights = ImportanceWeights(len(run.test))
    weights.add(log_w)
    assert torch.equal(weights.log_mean, bounds.log_likelihood)
    assert torch.equal(weights.effective_sample_size, bounds.effective_sample_size)
