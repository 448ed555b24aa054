"""Check the page that compares runs: it is complete, self-contained, and says what the runs say."""

import json
import re
import shlex
import sys
from dataclasses import asdict, replace

import pytest
import torch

from wakesleep_ext import cli
from wakesleep_ext.evaluation.bounds import log_likelihood_bounds
from wakesleep_ext.evaluation.importance import ImportanceWeights
from wakesleep_ext.helmholtz.config import ModelConfig
from wakesleep_ext.helmholtz.models import HelmholtzMachine
from wakesleep_ext.report import plots
from wakesleep_ext.report.page import Compared, _weights, command, page
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


OTHER = replace(CONFIG, training=replace(CONFIG.training, objective="iwae", num_samples=5))


def compared(name, config=CONFIG, result=RESULT, epochs=3, labels=None):
    records = [{"epoch": i + 1, "step": i, "test_elbo": -9.0 + i, "wake_loss": 9.0 - i} for i in range(epochs)]
    torch.manual_seed(len(name))
    machine = HelmholtzMachine.from_config(config.model)
    return Compared(name, config, records, result, machine, (torch.rand(30, 12) < 0.5).byte(), labels)


@pytest.fixture
def without_diagnostics(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz_stats", None)


@pytest.fixture(scope="module")
def html():
    """A page with every section."""
    pytest.importorskip("arviz_stats", reason="the extra wakesleep_ext[diagnostics] contains it")
    runs = [compared("first", labels=torch.arange(30) % 3), compared("<i>second</i>", OTHER, result=None)]
    return page(runs, num_images=25, num_samples=40, num_dreams=50)


def test_the_page_refers_to_no_other_file(html):
    assert set(re.findall(r'(?:src|href)="([^"]{1,5})', html)) <= {"data:", *re.findall(r'href="(#[^"]{0,4})', html)}
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\s\"<]+", html)) <= namespaces
    assert not re.search(r"<script|@import|url\((?!#)", html)
    assert len(html) < 1_000_000


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


def rows(html):
    """Return the cells of each row of the tables, by the name of the row."""
    found = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr><td>.*</tr>", html)]
    return {name: cells for name, *cells in found}


def test_the_table_has_the_results_or_dashes(html):
    found = rows(html.split("Learning curves")[0])
    shares = [float(share.removesuffix("%")) / 100 for share in found.pop("images with k &gt; 0.38")]
    assert all(0 <= share <= 1 for share in shares)
    assert [len(found.pop(name)) for name in ("median Pareto k", "effective samples of 40")] == [2, 2]
    assert found == {
        "objective": ["wake-sleep", "iwae"],
        "epochs": ["3 of 3", "3 of 3"],
        "NLL bound": ["7.12 (K = 10)", "–"],  # noqa: RUF001
        "−ELBO": ["8.50", "7.00"],  # noqa: RUF001
        "KL": ["1.50", "–"],  # noqa: RUF001
        "active units": ["2 of 2, 1 of 1", "–"],  # noqa: RUF001
        "energy distance": ["0.2500", "–"],  # noqa: RUF001
    }


def test_settings_are_divided_into_different_and_equal(html):
    different, equal = map(rows, html.split("Settings that differ")[1].split("<details>"))
    assert different == {"training objective": ["wake-sleep", "iwae"], "training num samples": ["1", "5"]}
    assert equal["model latent"] == ["2 1", "2 1"]


def test_there_are_figures_of_every_kind(html):
    """SBC of layer 1 has two variables, so one figure for each run. The other tests have one for both."""
    counts = {
        "Learning curves": 2,  # ELBO, wake loss
        "Dreams and reconstructions": 0,
        "Latent variables": 2 * len(MODEL.latent),
        "Importance weights": 3,  # weights, sample sizes, Pareto's k
        "Calibration": 2 + 1 + 2,
        "Settings that differ": 0,
    }
    parts = re.split(r"<h2>(.*?)</h2>", html)[1:]
    assert {name: part.count("<svg") for name, part in zip(parts[::2], parts[1::2], strict=True)} == counts | {
        "Commands": 0
    }
    assert html.count("<img") == 4


def test_labels_colour_the_latent_variables(html):
    first, *others = html.split("Latent variables")[1].split("<h2>")[0].split("<svg")[1:]
    assert "<!-- label -->" in first
    assert not any("<!-- label -->" in svg for svg in others[1:])
    assert "coloured by their labels" in html


def test_two_components_show_the_directions_of_greatest_variance():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3000, 3, generator=generator, dtype=torch.float64) * torch.tensor([0.1, 1.0, 2.0])
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    figure = plots.latent_means(latents @ rotation.t() + 7, None, "any")
    (points,) = (torch.from_numpy(drawn.get_offsets().data) for drawn in figure.axes[0].collections)
    expected = (latents - latents.mean(0))[:, [2, 1]]
    signs = (points * expected).sum(0).sign()
    torch.testing.assert_close(points * signs, expected, rtol=0, atol=0.1)
    assert figure.axes[0].get_xlabel() == "component 1 (80% of the variance)"


@pytest.mark.parametrize("size", [1, 2])
def test_up_to_two_variables_are_drawn_as_they_are(size):
    means, labels = torch.arange(6.0).view(3, 2)[:, :size], torch.tensor([40, -1, 40])
    figure = plots.latent_means(means, labels, "any")
    axes, bar = figure.axes
    (points,) = axes.collections
    assert points.get_offsets()[:, :size].tolist() == means.tolist()
    figure.canvas.draw()
    assert [text.get_text() for text in bar.get_yticklabels()] == ["-1", "40"]


@pytest.mark.usefixtures("without_diagnostics")
def test_without_the_extra_the_page_says_what_is_missing():
    text = page([compared("run")], num_images=3, num_samples=30, num_dreams=9)
    assert text.count("the extra <code>diagnostics</code>") == 2
    assert text.count("<svg") == 2 + 2 + 2
    assert "median Pareto k" not in text


@pytest.mark.usefixtures("without_diagnostics")
def test_paths_of_data_are_not_shown(tmp_path, monkeypatch):
    """In the folder above the data, the command finds them by a relative path; elsewhere by the whole path."""
    config = replace(CONFIG, data=str(tmp_path / "data" / "digits"))
    assert f"--data {tmp_path}/data/digits" in command(config)
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    assert "--data ./digits" in command(config)
    text = page([compared("run", config)], num_images=3, num_samples=30, num_dreams=9)
    assert str(tmp_path) not in text
    assert rows(text)["data"] == ["digits"]


@pytest.mark.usefixtures("without_diagnostics")
def test_a_run_without_an_epoch_has_a_page():
    text = page([compared("new", result=None, epochs=0)], num_images=3, num_samples=30, num_dreams=9)
    assert "0 of 3" in text
    assert "Test: " not in text


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
    log_w, _ = _weights(run, len(run.test), 50, seed=3, with_k=False)
    bounds = log_likelihood_bounds(
        run.machine.recognition, run.machine.generative, run.test, 50, seed=3, chunk_rows=50 * 20
    )
    weights = ImportanceWeights(len(run.test))
    weights.add(log_w)
    assert torch.equal(weights.log_mean, bounds.log_likelihood)
    assert torch.equal(weights.effective_sample_size, bounds.effective_sample_size)
