"""Compare annealed importance sampling with log p(x) by quadrature and enumeration, within its own error bars."""

import math

import pytest
import torch
from exact import every_binary, log_likelihood, random_machine
from torch import nn

from wakesleep_ext.check.problems import bar_images
from wakesleep_ext.evaluation.annealing import annealed_log_likelihood
from wakesleep_ext.helmholtz.conditionals import BernoulliConditional, GaussianConditional, StandardGaussianPrior
from wakesleep_ext.helmholtz.config import ModelConfig
from wakesleep_ext.helmholtz.models import GenerativeNetwork, HelmholtzMachine
from wakesleep_ext.helmholtz.networks import Constant
from wakesleep_ext.helmholtz.objectives import reweighted_wake_losses, sleep_phi_loss


def assert_within_its_error_bars(found, exact, largest_error):
    """Check each image and the mean. The errors must be small, but not zero."""
    assert (found.standard_error > 0).all()
    assert found.standard_error.max() < largest_error
    off = (found.log_likelihood - exact) / found.standard_error
    assert off.abs().max() < 4.5
    assert off.square().mean() < 2.5
    assert abs(found.mean - exact.mean().item()) < 4 * found.standard_error_of_mean


def joint_fixed_point():
    """Make a model of four pixels and one Gaussian variable; D = 4, log-odds a z + b."""
    linear = nn.Linear(1, 4, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[2.0], [-1.5], [1.0], [0.5]]))
        linear.bias.copy_(torch.tensor([0.0, 0.5, -0.5, 0.25]))
    return GenerativeNetwork([BernoulliConditional(linear), StandardGaussianPrior(1).double()])


def test_the_entropy_of_the_joint_fixed_point():
    x = every_binary(4)
    machine = random_machine((1,), observed=4)
    machine.generative = joint_fixed_point()
    exact = log_likelihood(machine, x)
    entropy = -(exact.exp() * exact).sum()
    torch.testing.assert_close(entropy.item(), 2.6138498, rtol=0, atol=1e-6)
    found = annealed_log_likelihood(machine.generative, x, num_chains=200, num_temperatures=30)
    assert_within_its_error_bars(found, exact, largest_error=0.05)
    annealed_entropy = -(exact.exp() * found.log_likelihood).sum().item()
    error = (exact.exp() * found.standard_error).square().sum().sqrt().item()
    assert abs(annealed_entropy - 2.6138498) < 3 * error


@pytest.mark.thorough
@pytest.mark.parametrize(("latents", "latent"), [("gaussian", (2,)), ("bernoulli", (6,)), ("bernoulli", (4, 3))])
def test_a_machine_that_has_learnt_bars(latents, latent):
    images = bar_images().grey
    x, counts = images.double().unique(dim=0, return_counts=True)
    probability = counts.double() / len(images)
    machine = HelmholtzMachine.from_config(ModelConfig(16, latent, (16,), (16,), (8,), latents), images.float().mean(0))
    optimizer = torch.optim.Adam(machine.parameters(), lr=0.01)
    for _ in range(400):
        optimizer.zero_grad()
        batch = images[torch.randint(len(images), (50,))]
        theta, phi = reweighted_wake_losses(machine.recognition, machine.generative, batch, 5)
        (theta + phi + sleep_phi_loss(machine.recognition, machine.generative, 50)).backward()
        optimizer.step()
    machine = machine.double()
    exact = log_likelihood(machine, x, points=150)
    nll = -(probability @ exact).item()
    assert 2.376389 < nll < 7.0  # independent pixels come to 8.006
    found = annealed_log_likelihood(machine.generative, x, num_chains=30, num_temperatures=150)
    assert_within_its_error_bars(found, exact, largest_error=0.5)
    error = (probability * found.standard_error).square().sum().sqrt().item()
    assert abs(-(probability @ found.log_likelihood).item() - nll) < 4 * error


@pytest.mark.parametrize("latents", ["gaussian", "bernoulli"])
def test_two_layers(latents):
    machine = random_machine((1, 1) if latents == "gaussian" else (3, 2), latents)
    x = every_binary(3)
    found = annealed_log_likelihood(machine.generative, x, num_chains=200, num_temperatures=20)
    assert_within_its_error_bars(found, log_likelihood(machine, x), largest_error=0.05)


def test_bars_are_honest_over_many_seeds():
    """Weights are unbiased on average, and their spread matches the reported error."""
    machine, x = random_machine((2,)), every_binary(3)[5:6].repeat(400, 1)
    found = annealed_log_likelihood(machine.generative, x, num_chains=10, num_temperatures=5)
    exact = log_likelihood(machine, x[:1])
    ratios = (found.log_likelihood - exact).exp()
    assert abs(ratios.mean() - 1) < 4 * ratios.std() / 20
    assert found.standard_error.square().mean().sqrt() == pytest.approx(ratios.std().item(), rel=0.2)


def test_step_sizes_find_the_acceptance_that_is_aimed_at():
    linear = nn.Linear(20, 30, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.normal_(std=2.0)
    generative = GenerativeNetwork([BernoulliConditional(linear), StandardGaussianPrior(20).double()])
    x = generative.dream(4).x
    found = annealed_log_likelihood(generative, x, num_chains=10, num_temperatures=200)
    assert found.acceptance.sub(0.65).abs().max() < 0.15


def test_a_posterior_that_q_has_lost_half_of_is_found_whole():
    """x is on where z_1 z_2 > 0, in two modes. Chains that start from the prior reach both."""

    class Product(nn.Module):
        def forward(self, z):
            return 20 * z.prod(-1, keepdim=True)

    generative = GenerativeNetwork([BernoulliConditional(Product()), StandardGaussianPrior(2)])
    found = annealed_log_likelihood(generative, torch.ones(3, 1), num_chains=400, num_temperatures=30)
    assert_within_its_error_bars(found, torch.full((3,), -math.log(2), dtype=torch.float64), largest_error=0.05)


def test_memory_is_bounded_by_the_chunk():
    machine = random_machine((2,))
    rows, finished = [], []

    class Counted(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, z):
            rows.append(z[..., 0].numel())
            return self.network(z)

    machine.generative[0] = BernoulliConditional(Counted(machine.generative[0].network))
    x = every_binary(3)
    found = annealed_log_likelihood(machine.generative, x, 6, 3, chunk_rows=20, on_images=finished.append)
    assert max(rows) == 18
    assert finished == [3, 3, 2]
    assert found.log_likelihood.shape == found.standard_error.shape == found.acceptance.shape == (8,)


def test_chains_are_a_function_of_the_seed_and_leave_the_networks_alone():
    machine, x = random_machine((2, 1)), every_binary(3)
    state = torch.get_rng_state()
    first, second, other = (annealed_log_likelihood(machine.generative, x, 4, 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.log_likelihood, second.log_likelihood)
    assert not torch.equal(first.log_likelihood, other.log_likelihood)
    assert first.log_likelihood.dtype == first.standard_error.dtype == torch.float64
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in machine.parameters())


def test_one_chain_has_no_error_bar():
    found = annealed_log_likelihood(random_machine((2,)).generative, every_binary(3), 1, 3)
    assert found.log_likelihood.isfinite().all()
    assert found.standard_error.isnan().all()


@pytest.mark.parametrize("name", ["num_chains", "num_temperatures", "moves", "chunk_rows"])
def test_annealing_refuses_counts_below_one(name):
    with pytest.raises(ValueError, match=f"annealed_log_likelihood: expected {name} >= 1, got 0"):
        annealed_log_likelihood(random_machine((2,)).generative, every_binary(3), **{name: 0})


def test_layers_of_two_kinds_are_refused():
    generative = GenerativeNetwork(
        [
            BernoulliConditional(nn.Linear(2, 3)),
            GaussianConditional(nn.Linear(2, 4)),
            BernoulliConditional(Constant(2)),
        ]
    )
    with pytest.raises(ValueError, match="all Gaussian or all Bernoulli, got Gaussian, Bernoulli"):
        annealed_log_likelihood(generative, every_binary(3))
