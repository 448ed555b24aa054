"""Both phases against expectations taken exactly, over every image and by quadrature over z."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wakesleep_ext.conditionals import BernoulliConditional, GaussianConditional, StandardGaussianPrior
from wakesleep_ext.models import GenerativeNetwork, HelmholtzMachine, ModelConfig, RecognitionNetwork
from wakesleep_ext.objectives import sleep_phi_loss, wake_theta_loss
from wakesleep_ext.random import make_key

D = 3
EVERY_IMAGE = torch.tensor(list(itertools.product([0.0, 1.0], repeat=D)), dtype=torch.float64)


@pytest.fixture
def machine():
    """One latent variable, three pixels, far enough from its start to have something to say."""
    torch.manual_seed(0)
    machine = HelmholtzMachine(ModelConfig(D, (1,), (4,), (4,)), torch.tensor([0.2, 0.5, 0.7]))
    with torch.no_grad():
        for parameter in machine.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return machine.double()


def quadrature():
    """Nodes and weights of the standard Gaussian, exact beyond what is asked of them here."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    return torch.tensor(nodes), torch.tensor(weights / math.sqrt(2 * math.pi))


def log_bernoulli(logits, x):
    logits, x = torch.broadcast_tensors(logits, x)
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)


def exact_wake_loss(machine, x):
    nodes, weights = quadrature()
    with torch.no_grad():
        mu, logvar = machine.recognition[0].network(x).chunk(2, -1)
        z = mu + (logvar / 2).exp() * nodes  # [B, nodes]
    log_p = log_bernoulli(machine.generative[0].network(z[..., None]), x[:, None])
    return -(weights * log_p).sum(-1).mean()


def exact_sleep_loss(machine):
    nodes, weights = quadrature()
    with torch.no_grad():
        logits = machine.generative[0].network(nodes[:, None])
        p_x_given_z = log_bernoulli(logits[:, None], EVERY_IMAGE).exp()  # [nodes, 2^D]
    mu, logvar = machine.recognition[0].network(EVERY_IMAGE).chunk(2, -1)
    q = torch.distributions.Normal(mu[:, 0], (logvar[:, 0] / 2).exp())
    return -(weights[:, None] * p_x_given_z * q.log_prob(nodes[:, None])).sum()


def gradients(loss, network):
    loss.backward()
    found = {name: p.grad.clone() for name, p in network.named_parameters()}
    network.zero_grad()
    return found


def test_the_wake_loss_and_its_gradient_are_unbiased(machine):
    x = EVERY_IMAGE[[1, 4, 6]]
    exact = exact_wake_loss(machine, x)
    sampled = wake_theta_loss(machine.recognition, machine.generative, x, 200_000, keys=[make_key(0)])
    torch.testing.assert_close(sampled, exact, rtol=0, atol=0.01)
    torch.testing.assert_close(
        gradients(sampled, machine.generative),
        gradients(exact, machine.generative),
        rtol=0,
        atol=0.01,
    )


def test_the_sleep_loss_and_its_gradient_are_unbiased(machine):
    exact = exact_sleep_loss(machine)
    sampled = sleep_phi_loss(machine.recognition, machine.generative, 400_000, keys=(make_key(0, 0), make_key(0, 1)))
    torch.testing.assert_close(sampled, exact, rtol=0, atol=0.02)
    torch.testing.assert_close(
        gradients(sampled, machine.recognition),
        gradients(exact, machine.recognition),
        rtol=0,
        atol=0.02,
    )


def test_each_phase_trains_one_network_only(machine):
    x = EVERY_IMAGE
    wake_theta_loss(machine.recognition, machine.generative, x, 2).backward()
    assert all(p.grad is None for p in machine.recognition.parameters())
    assert all(p.grad.abs().sum() > 0 for p in machine.generative.parameters())

    machine.zero_grad()
    sleep_phi_loss(machine.recognition, machine.generative, 50).backward()
    assert all(p.grad is None for p in machine.generative.parameters())
    assert all(p.grad.abs().sum() > 0 for p in machine.recognition.parameters())


def test_wake_samples_are_averaged_evenly(machine):
    """L samples of one image are as one sample of L copies of it: the same draws, the same mean."""
    x, key = EVERY_IMAGE[5:6], make_key(7)
    several = wake_theta_loss(machine.recognition, machine.generative, x, 6, keys=[key])
    copies = wake_theta_loss(machine.recognition, machine.generative, x.repeat(6, 1), 1, keys=[key])
    torch.testing.assert_close(several, copies)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.float64])
def test_the_wake_loss_takes_pixels_of_any_dtype(machine, dtype):
    key = make_key(7)
    expected = wake_theta_loss(machine.recognition, machine.generative, EVERY_IMAGE, keys=[key])
    loss = wake_theta_loss(machine.recognition, machine.generative, EVERY_IMAGE.to(dtype), keys=[key])
    torch.testing.assert_close(loss, expected)


def test_losses_are_functions_of_their_keys(machine):
    networks = machine.recognition, machine.generative
    keys = make_key(1, 0), make_key(1, 1)
    assert torch.equal(
        wake_theta_loss(*networks, EVERY_IMAGE, keys=keys[:1]),
        wake_theta_loss(*networks, EVERY_IMAGE, keys=keys[:1]),
    )
    assert torch.equal(sleep_phi_loss(*networks, 20, keys=keys), sleep_phi_loss(*networks, 20, keys=keys))
    assert not torch.equal(wake_theta_loss(*networks, EVERY_IMAGE), wake_theta_loss(*networks, EVERY_IMAGE))


def test_both_phases_compile_without_graph_breaks(machine):
    torch.compiler.reset()
    networks, keys = (machine.recognition, machine.generative), (make_key(1, 0), make_key(1, 1))
    for loss, arguments, keywords, network in (
        (wake_theta_loss, (EVERY_IMAGE, 4), {"keys": keys[:1]}, machine.generative),
        (sleep_phi_loss, (20,), {"keys": keys}, machine.recognition),
    ):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*networks, *arguments, **keywords)
        eager = loss(*networks, *arguments, **keywords)
        torch.testing.assert_close(compiled, eager)
        torch.testing.assert_close(gradients(compiled, network), gradients(eager, network))


def test_networks_may_be_any_modules():
    """Nothing but their two signatures is asked of the networks."""

    class Causes(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(2.0))

        def forward(self, z):
            return self.slope * z

    class Guess(nn.Module):
        def __init__(self):
            super().__init__()
            self.packed = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return self.packed.expand(*x.shape[:-1], 2)

    recognition = RecognitionNetwork([GaussianConditional(Guess())])
    generative = GenerativeNetwork([BernoulliConditional(Causes()), StandardGaussianPrior(1)])
    assert wake_theta_loss(recognition, generative, torch.ones(5, 1), 3).shape == ()
    assert sleep_phi_loss(recognition, generative, 4).shape == ()
