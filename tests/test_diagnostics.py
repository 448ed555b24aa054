"""Check that the diagnostics accept exact posteriors and find planted faults, on models whose posteriors are known."""

from __future__ import annotations

import json
import math
import sys
from itertools import count
from pathlib import Path
from typing import get_args

import pytest
import torch
from exact import random_machine
from PIL import Image
from torch import nn
from torch.distributions import Chi2, MultivariateNormal

from wakesleep_ext import cli
from wakesleep_ext.evaluation.calibration import Posterior, Ranks, calibrate, rank
from wakesleep_ext.evaluation.diagnostics import (
    Diagnosis,
    diagnose,
    diagnose_machine,
    importance_pareto_k,
    recognition_losses,
)
from wakesleep_ext.evaluation.gradient_noise import GradientNoise, gradient_noise
from wakesleep_ext.evaluation.importance import pareto_k, pareto_threshold
from wakesleep_ext.helmholtz.conditionals import BernoulliConditional, GaussianConditional, StandardGaussianPrior
from wakesleep_ext.helmholtz.models import GenerativeNetwork, HelmholtzMachine, RecognitionNetwork
from wakesleep_ext.random import make_key
from wakesleep_ext.report import plots
from wakesleep_ext.training.config import Objective

SIZE, NOISE = 3, 0.5
SIMULATIONS = 1000


class LinearGaussian:
    """z ~ N(0, I), x ~ N(A z, NOISE^2 I), in float64, with its posterior."""

    def __init__(self) -> None:
        torch.manual_seed(1)  # each band excludes the exact posterior under one seed of 20
        self.a = torch.randn(4, SIZE, dtype=torch.float64)
        precision = torch.eye(SIZE, dtype=torch.float64) + self.a.T @ self.a / NOISE**2
        self.covariance = precision.inverse()
        self.slope = self.covariance @ self.a.T / NOISE**2
        self.z = torch.randn(SIMULATIONS, SIZE, dtype=torch.float64)
        self.x = self.z @ self.a.T + NOISE * torch.randn(SIMULATIONS, 4, dtype=torch.float64)

    def log_joint(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return -(z.square().sum(-1) + (x - z @ self.a.T).square().sum(-1) / NOISE**2) / 2

    def posterior(self, variance: float = 1.0, shift: float = 0.0, draws: int | None = None) -> Posterior:
        """Return the exact posterior, or one with a fault.

        Args:
            variance: factor of the covariance.
            shift: of the mean, in standard deviations of the posterior.
            draws: number of different draws, which are repeated; all are different by default.
        """

        def q(x: torch.Tensor) -> MultivariateNormal:
            mean = x @ self.slope.T + shift * self.covariance.diagonal().sqrt()
            return MultivariateNormal(mean, variance * self.covariance)

        def sample(x: torch.Tensor, n: int) -> torch.Tensor:
            return q(x).sample((draws or n,)).repeat(n // (draws or n), 1, 1)

        return Posterior(sample, lambda z, x: q(x).log_prob(z))


@pytest.fixture(scope="module")
def model() -> LinearGaussian:
    return LinearGaussian()


@pytest.fixture
def _arviz() -> None:
    pytest.importorskip("arviz_stats", reason="the extra wakesleep_ext[diagnostics] contains it")


FAULTS = {
    "variance halved": {"variance": 0.5},
    "variance doubled": {"variance": 2.0},
    "mean shifted": {"shift": 0.5},
    "draws from one sample": {"draws": 1},
}


@pytest.mark.usefixtures("_arviz")
def test_the_exact_posterior_passes_every_test(model: LinearGaussian) -> None:
    torch.manual_seed(0)
    found = diagnose(model.z, model.x, model.posterior(), model.log_joint, observed=model.x[:50])
    assert not any(ranks.outside().any() for ranks in found.ranks.values())
    assert found.pareto_k is not None
    assert found.pareto_k.eq(0).all()
    assert found.coverage.ecdf()[[49, 89], 0].tolist() == pytest.approx([0.5, 0.9], abs=0.05)


@pytest.mark.usefixtures("_arviz")
@pytest.mark.parametrize("fault", FAULTS)
def test_every_calibration_test_finds_a_fault(model: LinearGaussian, fault: str) -> None:
    found = diagnose(model.z, model.x, model.posterior(**FAULTS[fault]))
    assert all(ranks.outside().all() for ranks in found.ranks.values())


@pytest.mark.parametrize("variance", [0.5, 2.0])
def test_expected_coverage_is_that_of_the_formula(model: LinearGaussian, variance: float) -> None:
    """The region of credibility c of N(m, v S) is where the Mahalanobis distance is below the quantile of chi squared.
    Under N(m, S), its probability is known."""
    ranks = calibrate(model.z, model.x, model.posterior(variance)).coverage
    chi2 = Chi2(torch.tensor(float(SIZE), dtype=torch.float64))
    radii = torch.linspace(0, 40, 20_001, dtype=torch.float64)
    quantiles = radii[torch.searchsorted(chi2.cdf(radii[1:]), ranks.levels())]
    expected = chi2.cdf(variance * quantiles)
    error = (expected * (1 - expected) / SIMULATIONS).sqrt()
    assert ((ranks.ecdf()[:, 0] - expected).abs() < 4 * error + 0.01).all()


@pytest.mark.usefixtures("_arviz")
def test_references_that_depend_on_x_tell_the_prior_from_the_posterior(model: LinearGaussian) -> None:
    def sample(x: torch.Tensor, n: int) -> torch.Tensor:
        return torch.randn(n, len(x), SIZE, dtype=torch.float64)

    prior = Posterior(sample, lambda z, x: -z.square().sum(-1) / 2)
    blind = calibrate(model.z, model.x, prior)
    assert not any(ranks.outside().any() for ranks in blind)
    assert calibrate(model.z, model.x, prior, references=model.x @ model.slope.T).tarp.outside().all()
    exact = model.posterior()
    assert not calibrate(model.z, model.x, exact, references=model.x @ model.slope.T).tarp.outside().any()


@pytest.mark.usefixtures("_arviz")
@pytest.mark.parametrize("functions", [1, 10])
def test_a_band_contains_all_curves_with_its_probability(functions: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sets = torch.randint(20, (400, 200, functions), generator=generator)
    outside = sum(Ranks(ranks, 19).outside(0.9).any().item() for ranks in sets)
    assert 0.05 < outside / 400 < 0.14


def test_chunks_of_simulations_change_nothing(model: LinearGaussian) -> None:
    z, x, table = model.z[:40], model.x[:40], torch.randn(9, 40, SIZE, dtype=torch.float64)
    finished: list[int] = []

    def looked_up(x: torch.Tensor, n: int) -> torch.Tensor:
        return table[:, (x[:, None] == model.x[:40]).all(-1).double().argmax(-1)]

    posterior = Posterior(looked_up, model.posterior().log_prob)
    whole, chunks = (
        calibrate(z, x, posterior, 9, chunk_rows=rows, on_simulations=finished.append) for rows in (1000, 63)
    )
    assert finished == [40, 7, 7, 7, 7, 7, 5]
    for one, other in zip(whole, chunks, strict=True):
        assert torch.equal(one.ranks, other.ranks)
    assert torch.equal(whole.marginals.ranks, (table < z).sum(0))


def test_equal_values_have_uniform_ranks() -> None:
    values = torch.bernoulli(torch.full((5, 5000), 0.3), generator=torch.Generator().manual_seed(0))
    shares = rank(values[0], values[1:], make_key(0)).bincount(minlength=5) / 5000
    torch.testing.assert_close(shares, torch.full((5,), 0.2), rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(1, 3)}, r"with N >= 2, got torch.float32 \[1, 3\] and \[1000, 4\]"),
        ({"z": torch.zeros(1000, 3, dtype=torch.int64)}, "expected floating z"),
        ({"num_samples": 0}, "expected num_samples >= 1, got 0"),
        ({"references": torch.zeros(1000, 2)}, r"expected references of shape \[1000, 3\], got \[1000, 2\]"),
        ({"posterior": Posterior(lambda x, n: x, lambda z, x: x)}, r"have shape \[5, 1000, K\], got \[1000, 4\]"),
        (
            {"posterior": Posterior(lambda x, n: torch.zeros(n, len(x), 3), lambda z, x: z)},
            r"expected log_prob\(z, x\) to have shape \[5, 1000\], got \[5, 1000, 3\]",
        ),
        (
            {"posterior": Posterior(lambda x, n: torch.zeros(n, len(x), 2), lambda z, x: z[..., 0])},
            "expected posterior draws of size 3, got 2",
        ),
        (
            {"posterior": Posterior(lambda x, n: torch.full((n, len(x), 3), math.nan), lambda z, x: z[..., 0])},
            r"expected sample\(x, n\) to return numbers, got NaN",
        ),
    ],
)
def test_unsuitable_arguments_are_named(model: LinearGaussian, change: dict, message: str) -> None:
    arguments = {"z": model.z, "x": model.x, "posterior": model.posterior(), "num_samples": 5} | change
    with pytest.raises(ValueError, match=message):
        calibrate(**arguments)


@pytest.mark.usefixtures("_arviz")
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_pareto_k_is_that_of_the_formula(share: float) -> None:
    """The weights N(z; 0, 1) / N(z; 0, s) of draws with variance s have the tail index 1 - s."""
    z = math.sqrt(share) * torch.randn(20_000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    k = pareto_k((z.square() / share - z.square()) / 2)
    torch.testing.assert_close(k.mean().item(), 1 - share, rtol=0, atol=0.08)


@pytest.mark.usefixtures("_arviz")
def test_pareto_k_finds_faults(model: LinearGaussian) -> None:
    def k(num_weights: int = 1000, **fault: float) -> torch.Tensor:
        return importance_pareto_k(model.x[:30], model.posterior(**fault), model.log_joint, num_weights)

    assert k(variance=0.5).median() > 0.4  # infinite variance of the weights; 0 for the exact posterior
    assert k(variance=0.2).median() > pareto_threshold(1000)
    assert k(shift=2.0).median() > pareto_threshold(1000)
    assert k(draws=1).isinf().all()


@pytest.mark.usefixtures("_arviz")
def test_weights_without_a_tail_have_no_fit() -> None:
    one_positive, one_large, equal = torch.full((3, 100, 1), -5.0).unbind()
    one_positive[:] = -math.inf
    one_positive[3] = one_large[3] = 0.0
    assert pareto_k(one_positive).tolist() == [math.inf]
    assert pareto_k(one_large).isnan().all()
    assert pareto_k(equal - 2000).tolist() == [0.0]
    assert pareto_k(torch.linspace(0, 1e5, 100)[:, None]).tolist() == [math.inf]
    for log_w, message in (
        (torch.full((100, 2), -math.inf), "got others for 2 images"),
        (torch.full((100, 2), math.nan), "got others for 2 images"),
        (torch.zeros(24, 2), r"with K >= 25, got \[24, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            pareto_k(log_w)


def test_signal_and_noise_are_those_of_the_distribution() -> None:
    torch.manual_seed(0)
    parameters = [torch.zeros(50, requires_grad=True), torch.zeros(50, dtype=torch.float64, requires_grad=True)]
    unused = torch.zeros(3, requires_grad=True)

    def loss(mean: float) -> torch.Tensor:
        return sum(((mean + 2 * torch.randn(50)) * parameter).sum() for parameter in parameters)

    found = gradient_noise(lambda: loss(0.5), [*parameters, unused], 2000)
    assert found.signal == pytest.approx(5, rel=0.02)
    assert found.noise == pytest.approx(20, rel=0.02)
    assert found.ratio == found.signal / found.noise
    uncorrected = (found.noise**2 / 2000) ** 0.5  # the norm of the mean of gradients whose expectation is 0
    assert gradient_noise(lambda: loss(0.0), parameters, 2000).signal < 0.7 * uncorrected
    assert parameters[0].grad is None
    with pytest.raises(ValueError, match="at least two gradients and one parameter, got 1 and 2"):
        gradient_noise(lambda: loss(0.0), parameters, 1)
    with pytest.raises(ValueError, match="expected finite gradients"):
        gradient_noise(lambda: loss(math.nan), parameters, 2)


def test_a_gradient_without_noise_has_an_infinite_ratio() -> None:
    parameter = torch.ones(2, requires_grad=True)
    assert gradient_noise(lambda: (3 * parameter).sum(), [parameter], 2).ratio == math.inf


def exact_gaussian_machine() -> HelmholtzMachine:
    """Return a machine with x ~ N(z, 0.25) and z ~ N(0, 1), whose q is the posterior N(0.8 x, 0.2)."""
    q, p = nn.Linear(1, 2, dtype=torch.float64), nn.Linear(1, 2, dtype=torch.float64)
    with torch.no_grad():
        q.weight.copy_(torch.tensor([[0.8], [0.0]], dtype=torch.float64))
        q.bias.copy_(torch.tensor([0.0, math.log(0.2)], dtype=torch.float64))
        p.weight.copy_(torch.tensor([[1.0], [0.0]]))
        p.bias.copy_(torch.tensor([0.0, math.log(0.25)], dtype=torch.float64))
    return HelmholtzMachine(
        RecognitionNetwork([GaussianConditional(q)]),
        GenerativeNetwork([GaussianConditional(p), StandardGaussianPrior(1)]),
    ).double()


def exact_bernoulli_machine() -> HelmholtzMachine:
    """Return a machine with one Bernoulli variable z and three pixels, whose q is the posterior."""
    torch.manual_seed(0)
    p, q = nn.Linear(1, 3, dtype=torch.float64), nn.Linear(3, 1, dtype=torch.float64)
    prior = nn.Linear(1, 1, dtype=torch.float64)
    with torch.no_grad():
        off, on = p.bias, p.bias + p.weight[:, 0]
        q.weight.copy_((on - off)[None])
        q.bias.copy_(prior.bias - (nn.functional.softplus(on) - nn.functional.softplus(off)).sum())

    class Prior(BernoulliConditional):
        def forward(self, given: torch.Tensor | None) -> object:
            return super().forward(torch.zeros(1, dtype=torch.float64))

    return HelmholtzMachine(
        RecognitionNetwork([BernoulliConditional(q)]), GenerativeNetwork([BernoulliConditional(p), Prior(prior)])
    )


@pytest.mark.usefixtures("_arviz")
@pytest.mark.parametrize("make", [exact_gaussian_machine, exact_bernoulli_machine])
def test_an_exact_machine_passes_and_a_shifted_one_fails(make: object) -> None:
    machine = make()
    x = machine.dream(20, keys=[make_key(5, draw) for draw in range(2)]).x
    exact = diagnose_machine(machine, x, SIMULATIONS, num_gradients=0, seed=3)
    assert not any(ranks.outside().any() for ranks in exact.ranks.values())
    assert exact.pareto_k.eq(0).all()
    with torch.no_grad():
        machine.recognition[0].network.bias[0] += 0.5
    shifted = diagnose_machine(machine, x, SIMULATIONS, num_gradients=0)
    assert shifted.layers[0].outside().all()
    assert any(shifted.ranks[name].outside().all() for name in ("expected coverage", "TARP"))


def test_low_variance_gradients_have_no_noise_at_the_posterior() -> None:
    machine = exact_gaussian_machine()
    x, keys = machine.dream(50).x, (make_key(0, number) for number in count())
    losses = recognition_losses(machine, x, 5, 20, keys)
    noise = {name: gradient_noise(loss, machine.recognition.parameters(), 20).noise for name, loss in losses.items()}
    assert {name for name, of in noise.items() if of < 1e-12} == {
        "wake-phi score-cv",
        "wake-phi dreg",
        "wake-phi stl",
        "dreg",
    }
    assert min(of for of in noise.values() if of >= 1e-12) > 0.1


def test_every_objective_has_a_loss() -> None:
    names = recognition_losses(random_machine((2, 1)), torch.zeros(4, 3), 2, 4, iter(())).keys()
    assert {name for name in get_args(Objective) if "wake" not in name} <= names
    discrete = recognition_losses(random_machine((3,), "bernoulli"), torch.zeros(4, 3), 2, 4, iter(())).keys()
    assert discrete == {"sleep", "wake-phi score", "wake-phi score-cv", "vimco"}
    with pytest.raises(ValueError, match="expected num_samples of at least 2 with all objectives, got 1"):
        recognition_losses(random_machine((2,)), torch.zeros(4, 3), 1, 4, iter(()))


@pytest.fixture(scope="module", params=["gaussian", "bernoulli"])
def diagnosis(request: pytest.FixtureRequest) -> Diagnosis:
    pytest.importorskip("arviz_stats")
    machine = random_machine((3, 2), request.param)
    x = torch.randint(2, (30, 3), generator=torch.Generator().manual_seed(0)).double()
    return diagnose_machine(machine, x, 200, num_weights=100, num_gradients=5)


def test_layers_are_reported_one_by_one(diagnosis: Diagnosis, tmp_path: Path) -> None:
    summary = json.loads(json.dumps(diagnosis.summary(), allow_nan=False))
    assert summary["functions"] == {"SBC of layer 1": 3, "SBC of layer 2": 2, "expected coverage": 1, "TARP": 1}
    assert summary["simulations"] == 200
    assert summary["pareto_k"]["observations"] == 30
    assert 0 <= summary["coverage"]["0.5"] <= summary["coverage"]["0.9"] <= 1
    table = diagnosis.table()
    assert all(name in table for name in [*summary["functions"], *summary["gradient_signal_to_noise"], "Pareto k"])
    plots.diagnosis(tmp_path / "found.png", diagnosis)
    with Image.open(tmp_path / "found.png") as image:
        assert image.height == pytest.approx(0.64 * image.width, rel=0.01)  # two rows of three panels


def test_a_missing_package_is_named(model: LinearGaussian, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "arviz_stats", None)
    for call in (
        lambda: diagnose(model.z, model.x, model.posterior()),
        lambda: pareto_k(torch.zeros(100, 1)),
        lambda: Ranks(torch.zeros(7, 1, dtype=torch.int64), 3).band(),
    ):
        with pytest.raises(ModuleNotFoundError, match=r"arviz-stats\[xarray\]'.*wakesleep_ext\[diagnostics\]"):
            call()


def test_the_command_says_what_the_diagnostics_need(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "arviz_stats", None)
    for arguments, message in (
        (["--diagnostics", "100"], "--diagnostics: the diagnostics need arviz-stats"),
        (["--diagnostics", "-1"], "expected --diagnostics of at least 0, got -1"),
        (["--diagnostics", "1"], "expected --diagnostics of at least 2 with --diagnostics, got 1"),
        (["--diagnostics", "9", "--bound-samples", "24"], "expected --bound-samples of at least 25 with --diagnostics"),
    ):
        assert cli.main(["evaluate", "nowhere", *arguments]) == 1
        assert message in capsys.readouterr().err


def test_infinite_ratios_are_no_numbers_in_a_summary() -> None:
    found = {"none": GradientNoise(1.0, 0.0), "some": GradientNoise(1.0, 2.0)}
    ranks = Ranks(torch.arange(200)[:, None] % 20, 19)
    pytest.importorskip("arviz_stats")
    summary = Diagnosis([ranks], ranks, ranks, gradients=found).summary()
    assert summary["gradient_signal_to_noise"] == {"none": None, "some": 0.5}
