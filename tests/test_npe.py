"""Check that `fit_posterior` finds posteriors that are known, for our networks and for those of sbi."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import wakesleep_ext as ws
from wakesleep_ext.npe import fit_posterior

NOISE = 0.5


def simulate(number: int) -> tuple[Tensor, Tensor]:
    z = torch.randn(number, 2)
    return z, z + NOISE * torch.randn(number, 2)


def exact_loss(z: Tensor, x: Tensor) -> float:
    """Return the mean of -log p(z|x), where z ~ N(0, I) and x ~ N(z, NOISE^2 I)."""
    shrink = 1 / (1 + NOISE**2)
    return -ws.gaussian_log_prob(shrink * x, torch.full((2,), NOISE**2 * shrink).log(), z).mean().item()


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(2, 4)


def loss_of(network: nn.Module):
    return lambda z, x: -ws.gaussian_log_prob(*ws.gaussian_parameters(network(x)), z)


@pytest.mark.parametrize("fresh", [False, True])
def test_the_posterior_is_found(fresh: bool) -> None:
    network = linear()
    fit = fit_posterior(
        network,
        loss_of(network),
        simulate(2000),
        simulate=simulate if fresh else None,
        learning_rate=0.05,
        max_epochs=20,
    )
    assert fit.reason is None
    z, x = simulate(10_000)
    assert loss_of(network)(z, x).mean().item() == pytest.approx(exact_loss(z, x), abs=0.02)
    assert network.weight[0, 0].item() == pytest.approx(1 / (1 + NOISE**2), abs=0.05)


def test_training_stops_early_and_keeps_the_best_weights() -> None:
    network = linear()
    fit = fit_posterior(network, loss_of(network), simulate(400), learning_rate=0.3, stop_after_epochs=3)
    best = fit.validation_losses.index(min(fit.validation_losses))
    assert len(fit.validation_losses) == best + 1 + 3
    torch.manual_seed(1)
    simulations = simulate(400)
    held_out = torch.randperm(400, generator=torch.Generator().set_state(torch.get_rng_state()))[:40]
    fit = fit_posterior(network, loss_of(network), simulations, learning_rate=0.3, stop_after_epochs=2)
    found = loss_of(network)(simulations[0][held_out], simulations[1][held_out]).mean().item()
    assert found == pytest.approx(min(fit.validation_losses))


def test_long_gradients_are_scaled_down() -> None:
    """The first step of gradient descent by Adam ignores the scale, so the norm is seen by clipping to zero."""
    network = linear()
    before = network.weight.clone()
    fit_posterior(network, loss_of(network), simulate(400), clip_norm=0.0, max_epochs=3)
    torch.testing.assert_close(network.weight, before)


def test_unsuitable_simulations_are_named() -> None:
    network, (z, x) = linear(), simulate(100)
    with pytest.raises(
        ValueError, match=r"batch of 200 and held-out simulations, got 100 and 100, of which 10 are held"
    ):
        fit_posterior(network, loss_of(network), (z, x))
    with pytest.raises(ValueError, match="got 100 and 99"):
        fit_posterior(network, loss_of(network), (z, x[1:]), batch_size=10)
    with pytest.raises(ValueError, match="of which 0 are held out"):
        fit_posterior(network, loss_of(network), (z, x), batch_size=10, validation_fraction=0)
    with pytest.raises(ValueError, match="expected a finite loss, got nan after 1 epochs"):
        fit_posterior(network, lambda z, x: math.nan * network(x).sum(-1), (z, x), batch_size=10)


@pytest.mark.thorough
@pytest.mark.filterwarnings("default")
def test_an_estimator_of_sbi_finds_the_posterior_and_goes_back_to_sbi() -> None:
    inference = pytest.importorskip("sbi.inference")
    nets = pytest.importorskip("sbi.neural_nets")
    torch.manual_seed(0)
    simulations = simulate(4000)
    network = nets.posterior_nn("maf")(*simulations)
    fit = fit_posterior(
        network, lambda z, x: network.loss(z, condition=x), simulations, simulate=simulate, max_epochs=40
    )
    assert fit.reason is None
    z, x = simulate(10_000)
    assert network.loss(z, condition=x).mean().item() == pytest.approx(exact_loss(z, x), abs=0.05)
    prior = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    posterior = inference.NPE(prior, show_progress_bars=False).build_posterior(network, prior)
    typical = torch.tensor([[0.5, -0.5]])
    draws = posterior.sample((5000,), x=typical, show_progress_bars=False)
    torch.testing.assert_close(draws.mean(0), typical[0] / (1 + NOISE**2), rtol=0, atol=0.1)
    deviation = NOISE / math.sqrt(1 + NOISE**2)
    torch.testing.assert_close(draws.std(0), torch.full((2,), deviation), rtol=0.1, atol=0)
