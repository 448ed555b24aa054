"""Run Pyro's inference with our distributions and with Pyro's, and compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pyro = pytest.importorskip("pyro")

import pyro.distributions as dist  # noqa: E402
from pyro.infer import SVI, ReweightedWakeSleep, Trace_ELBO, TraceMeanField_ELBO  # noqa: E402

from wakesleep_ext.pyro import BernoulliVector, DiagonalGaussian  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")

OBSERVED, LATENT, IMAGES = 12, 3, 64


@pytest.fixture(autouse=True)
def _clear() -> None:
    pyro.clear_param_store()


def theirs_gaussian(mu: Tensor, logvar: Tensor) -> Any:
    return dist.Normal(mu, (logvar / 2).exp()).to_event(1)


def theirs_bernoulli(logits: Tensor) -> Any:
    return dist.Bernoulli(logits=logits).to_event(1)


class AutoEncoder(nn.Module):
    def __init__(self, gaussian: Callable[..., Any], bernoulli: Callable[..., Any]) -> None:
        super().__init__()
        self.gaussian, self.bernoulli = gaussian, bernoulli
        self.encoder, self.decoder = nn.Linear(OBSERVED, 2 * LATENT), nn.Linear(LATENT, OBSERVED)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.gaussian(x.new_zeros(LATENT), x.new_zeros(LATENT)))
            pyro.sample("x", self.bernoulli(self.decoder(z)), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.gaussian(*self.encoder(x).chunk(2, -1)))


def losses(gaussian: Callable[..., Any], bernoulli: Callable[..., Any], steps: int) -> Tensor:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model = AutoEncoder(gaussian, bernoulli)
    x = (torch.rand(IMAGES, OBSERVED) < torch.linspace(0.1, 0.9, OBSERVED)).float()
    svi = SVI(model.model, model.guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    return torch.tensor([svi.step(x) / IMAGES for _ in range(steps)])


def test_svi_trains_an_autoencoder_to_the_loss_of_pyros_own() -> None:
    ours, theirs = losses(DiagonalGaussian, BernoulliVector, 300), losses(theirs_gaussian, theirs_bernoulli, 300)
    assert ours[-100:].mean() < ours[:10].mean() - 1
    noise = (ours[-100:].var() + theirs[-100:].var()).sqrt().item() / 10
    assert ours[-100:].mean().item() == pytest.approx(theirs[-100:].mean().item(), abs=6 * noise)


@pytest.mark.parametrize("gaussian", [DiagonalGaussian, theirs_gaussian], ids=["ours", "Pyro's"])
def test_reweighted_wake_sleep_finds_a_conjugate_posterior(gaussian: Callable[..., Any]) -> None:
    """For z ~ N(0, 1) and x|z ~ N(z, s^2), the posterior of z is N(x / (1 + s^2), s^2 / (1 + s^2))."""
    pyro.set_rng_seed(0)
    noise = torch.tensor([0.25]).log()
    x = torch.randn(400, 1) * 1.25**0.5

    def model(x: Tensor) -> Tensor:
        with pyro.plate("data", 400):
            z = pyro.sample("z", gaussian(torch.zeros(1), torch.zeros(1)))
            return pyro.sample("x", gaussian(z, noise), obs=x)

    def guide(x: Tensor | None) -> None:
        slope, logvar = pyro.param("slope", torch.zeros(1)), pyro.param("logvar", torch.zeros(1))
        with pyro.plate("data", 400):
            pyro.sample("z", gaussian(slope * x, logvar))

    algorithm = ReweightedWakeSleep(num_particles=10, vectorize_particles=True, insomnia=1.0)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99}), algorithm)
    for _ in range(400):
        svi.step(x)
    assert pyro.param("slope").item() == pytest.approx(0.8, abs=0.05)
    assert pyro.param("logvar").exp().item() == pytest.approx(0.2, abs=0.03)


def test_ours_are_pyros_too() -> None:
    q = DiagonalGaussian(torch.zeros(4, 3), torch.zeros(4, 3))
    assert q().shape == (4, 3)
    assert type(q.expand((2, 4))) is DiagonalGaussian
    assert q.to_event(1).event_shape == (4, 3)
    assert q.mask(torch.zeros(4, dtype=torch.bool)).log_prob(q()).abs().sum() == 0


KINDS = {"ours": DiagonalGaussian, "Pyro's": theirs_gaussian}


@pytest.mark.parametrize(("guide_kind", "model_kind"), [("ours", "Pyro's"), ("Pyro's", "ours"), ("ours", "ours")])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_a_mean_field_elbo_is_exact(guide_kind: str, model_kind: str, num_particles: int) -> None:
    """Without data, the loss is the divergence, computed exactly without samples."""
    mu, logvar = torch.randn(2, 6, LATENT).unbind()
    logvar_of_prior = torch.tensor([0.5])

    def model() -> None:
        with pyro.plate("data", 6):
            pyro.sample("z", KINDS[model_kind](torch.full((LATENT,), 0.3), logvar_of_prior.expand(LATENT)))

    def guide() -> None:
        with pyro.plate("data", 6):
            pyro.sample("z", KINDS[guide_kind](pyro.param("mu", mu), pyro.param("logvar", logvar)))

    elbo = TraceMeanField_ELBO(num_particles=num_particles, vectorize_particles=num_particles > 1)
    q, p = theirs_gaussian(mu, logvar), theirs_gaussian(torch.full((6, LATENT), 0.3), logvar_of_prior)
    expected = torch.distributions.kl_divergence(q, p).sum().item()
    for seed in range(3):
        pyro.set_rng_seed(seed)
        assert elbo.loss(model, guide) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("guide_is_ours", [True, False])
def test_a_divergence_from_bernoullis_of_pyro_is_exact(guide_is_ours: bool) -> None:
    logits, other = torch.randn(2, 6, OBSERVED, dtype=torch.float64).unbind()
    kinds = [BernoulliVector, theirs_bernoulli] if guide_is_ours else [theirs_bernoulli, BernoulliVector]
    divergence = torch.distributions.kl_divergence(kinds[0](logits), kinds[1](other))
    expected = torch.distributions.kl_divergence(theirs_bernoulli(logits), theirs_bernoulli(other))
    torch.testing.assert_close(divergence, expected)


def test_a_divergence_between_events_of_more_dimensions_is_exact() -> None:
    mu, logvar = torch.randn(2, 6, LATENT).unbind()
    ours, theirs = DiagonalGaussian(mu, logvar).to_event(1), dist.Normal(torch.zeros(6, LATENT), 1.0).to_event(2)
    expected = torch.distributions.kl_divergence(theirs_gaussian(mu, logvar).to_event(1), theirs)
    torch.testing.assert_close(torch.distributions.kl_divergence(ours, theirs), expected)


def test_ours_take_the_names_of_torch() -> None:
    scale, probs = torch.full((4, 3), 0.5), torch.full((4, 3), 0.2)
    q, p = DiagonalGaussian(torch.zeros(4, 3), scale=scale), BernoulliVector(probs=probs)
    torch.testing.assert_close(q.expand((2, 4)).stddev, scale.expand(2, 4, 3))
    torch.testing.assert_close(p.expand((2, 4)).probs, probs.expand(2, 4, 3))
    z, x = q(), p()
    torch.testing.assert_close(q.log_prob(z), dist.Normal(0.0, scale).to_event(1).log_prob(z))
    torch.testing.assert_close(p.log_prob(x), dist.Bernoulli(probs).to_event(1).log_prob(x))
