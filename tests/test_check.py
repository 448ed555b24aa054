"""Check that `wakesleep check` passes, and that it detects mistakes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from wakesleep_ext import cli, ops
from wakesleep_ext.check import calibration, problems, training
from wakesleep_ext.check.problems import Answer, Check
from wakesleep_ext.densities import Gaussian
from wakesleep_ext.helmholtz.objectives import elbo_loss


def test_every_answer_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "ranks.png"
    status = cli.main(["check", "--quick", "--json", "--plot", str(picture)])
    told = json.loads(capsys.readouterr().out)
    assert [answer for answer in told["answers"] if not answer["passed"]] == []
    assert (status, told["failed"]) == (0, 0)
    assert {answer["problem"].split()[0] for answer in told["answers"]} == set("12345678")
    with Image.open(picture) as image:
        assert image.width > 4 * image.height  # a histogram for each latent variable that is calibrated


def failures(problem: Callable[[Check], Iterator[Answer]]) -> list[str]:
    return [answer.quantity for answer in problem(Check(quick=True, ranks={})) if not answer.passed]


def test_a_log_variance_that_counts_twice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The factor 1/2 of the log-variance is missing, the most common mistake in the sleep loss."""

    def log_prob_sum(self: Gaussian, value: Tensor, sample_weight: None = None, *, scale: float = 1.0) -> Tensor:
        return scale * (ops.gaussian_log_prob(self.mu, self.logvar, value) - self.logvar.sum(-1) / 2).sum()

    monkeypatch.setattr(Gaussian, "log_prob_sum", log_prob_sum)
    assert any("variance" in quantity for quantity in failures(problems.one_pixel))


@pytest.mark.thorough
def test_the_opposite_divergence_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The divergence of the ELBO replaces that of the sleep phase."""
    image = torch.ones(1, 1, dtype=torch.float64)
    monkeypatch.setattr(training, "sleep_phi_loss", lambda r, g, dreams, keys: elbo_loss(r, g, image, dreams))
    assert {"sleep: logvar 1", "sleep: logvar 2", "sleep: ELBO"} <= set(failures(problems.two_modes))


@pytest.mark.thorough
def test_a_generative_network_that_does_not_learn_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "wake_theta_loss", lambda r, g, x, **_: 0 * g.log_prob(r.rsample(x), x).mean())
    assert any("pixel mean" in quantity for quantity in failures(problems.stationarity))


def test_uniform_ranks_and_others() -> None:
    generator = torch.Generator().manual_seed(0)
    ranks = torch.randint(calibration.NUM_SAMPLES + 1, (10_000,), generator=generator)
    assert calibration.uniformity(ranks) > 0.01
    assert calibration.uniformity(ranks.clamp_min(1)) < 1e-6


def test_p_values_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    ranks = torch.arange(20).repeat_interleave(torch.arange(90, 110))
    expected = stats.chisquare(ranks.bincount()).pvalue
    assert calibration.uniformity(ranks) == pytest.approx(expected)


def wrong(check: Check) -> Iterator[Answer]:
    check.ranks["z"] = torch.arange(20)
    yield Answer("0 made up", "pi", math.pi, 3.0, 0.01, 0.01)
    yield Answer("0 made up", "p-value", 1.0, 0.5, 0.99, 0.0)
    yield Answer("0 made up", "lost", 1.0, math.nan, 1.0, 1.0)


def test_a_wrong_answer_fails_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(problems, "PROBLEMS", (wrong,))
    assert cli.main(["check"]) == 1
    titles, pi, p_value, lost, _, verdict = capsys.readouterr().out.splitlines()
    assert titles.split() == ["problem", "quantity", "expected", "got", "tolerance"]
    assert pi.split()[-6:] == ["pi", "3.141593", "3.000000", "±", "0.01", "FAIL"]
    assert p_value.split()[-6:] == ["1.000000", "0.500000", "0.01", "to", "1", "pass"]
    assert lost.endswith("FAIL")
    assert verdict == "2 of 3 wrong"


def test_a_picture_must_have_a_known_format(capsys: pytest.CaptureFixture[Any]) -> None:
    assert cli.main(["check", "--plot", "ranks.jpg"]) == 1
    assert "expected --plot to end in .png, .pdf, .svg, got ranks.jpg" in capsys.readouterr().err
