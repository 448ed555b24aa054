"""The bounds against log p(x) by quadrature, against their formula, and within their memory."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wakesleep_ext import ops
from wakesleep_ext.evaluation import independent_bernoulli_nll, log_likelihood_bounds
from wakesleep_ext.models import HelmholtzMachine, ModelConfig
from wakesleep_ext.random import make_key

EVERY_IMAGE = torch.tensor(list(itertools.product([0, 1], repeat=3)), dtype=torch.uint8)


@pytest.fixture
def machine():
    torch.manual_seed(0)
    machine = HelmholtzMachine(ModelConfig(3, (1,), (4,), (4,)), torch.tensor([0.2, 0.5, 0.7]))
    with torch.no_grad():
        for parameter in machine.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return machine


def networks(machine):
    return machine.recognition, machine.generative


@torch.no_grad()
def exact_log_likelihood(machine, x):
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    logits = machine.double().generative[0].network(torch.tensor(nodes)[:, None])[:, None]
    logits, x = torch.broadcast_tensors(logits, x.double())
    log_p = -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)
    log_weights = torch.tensor(weights / math.sqrt(2 * math.pi)).log()
    return torch.logsumexp(log_p + log_weights[:, None], 0)


def test_more_samples_close_the_gap_between_elbo_and_log_likelihood(machine):
    one, few, many = (
        log_likelihood_bounds(*networks(machine), EVERY_IMAGE.repeat(400, 1), samples)
        .log_likelihood.view(400, 8)
        .mean(0)
        for samples in (1, 5, 1000)
    )
    exact = exact_log_likelihood(machine, EVERY_IMAGE)
    assert (one < few).all()
    assert (few < many).all()
    torch.testing.assert_close(many, exact, rtol=0, atol=0.01)
    assert exact.exp().sum().item() == pytest.approx(1)


def test_bound_and_elbo_part_with_the_second_sample(machine):
    one = log_likelihood_bounds(*networks(machine), EVERY_IMAGE, 1)
    torch.testing.assert_close(one.elbo, one.log_likelihood)
    more = log_likelihood_bounds(*networks(machine), EVERY_IMAGE, 50)
    assert (more.elbo < more.log_likelihood).all()


def test_chunks_add_up_to_the_formula(machine):
    """Two chunks of images by three of samples, against log-sum-exp over all of them at once."""
    x, chunk_images, chunk_samples = EVERY_IMAGE, 5, 4
    offset = itertools.count()
    log_w = torch.zeros(10, 8, dtype=torch.float64)
    for images in torch.arange(8).split(chunk_images):
        mu, logvar = machine.recognition[0].network(x[images]).chunk(2, -1)
        for samples in torch.arange(10).split(chunk_samples):
            key = make_key(3, next(offset))
            z = ops.gaussian_rsample(mu, logvar, (len(samples),), key=key)
            q = torch.distributions.Normal(mu, (logvar / 2).exp())
            prior = torch.distributions.Normal(0.0, 1.0)
            pixels = torch.distributions.Bernoulli(logits=machine.generative[0].network(z))
            log_w[samples[:, None], images] = (
                (prior.log_prob(z) - q.log_prob(z)).sum(-1) + pixels.log_prob(x[images].float()).sum(-1)
            ).double()
    bounds = log_likelihood_bounds(
        *networks(machine), x, 10, seed=3, chunk_images=chunk_images, chunk_samples=chunk_samples
    )
    torch.testing.assert_close(bounds.elbo, log_w.mean(0), rtol=1e-5, atol=1e-6)
    expected = log_w.logsumexp(0) - math.log(10)
    torch.testing.assert_close(bounds.log_likelihood, expected, rtol=1e-5, atol=1e-6)


def test_weights_too_small_for_a_float_are_averaged_all_the_same(machine):
    with torch.no_grad():
        machine.generative[0].network.head.bias.fill_(-1e5)
    bounds = log_likelihood_bounds(*networks(machine), EVERY_IMAGE[-1:], 100)
    assert bounds.log_likelihood.item() == pytest.approx(-3e5, rel=1e-3)


def test_memory_is_bounded_by_the_chunks(machine):
    rows = []
    machine.generative[0].register_forward_pre_hook(lambda _, args: rows.append(args[0][..., 0].numel()))
    finished = []
    log_likelihood_bounds(
        *networks(machine),
        EVERY_IMAGE.repeat(6, 1),
        50,
        chunk_images=10,
        chunk_samples=7,
        on_images=finished.append,
    )
    assert max(rows) == 70
    assert sum(rows) == 48 * 50
    assert finished == [10, 10, 10, 10, 8]


def test_results_are_double_and_a_function_of_the_seed(machine):
    first, second, other = (log_likelihood_bounds(*networks(machine), EVERY_IMAGE, 3, seed=seed) for seed in (1, 1, 2))
    assert first.elbo.dtype == first.log_likelihood.dtype == torch.float64
    assert torch.equal(first.log_likelihood, second.log_likelihood)
    assert not torch.equal(first.log_likelihood, other.log_likelihood)


@pytest.mark.parametrize("name", ["num_samples", "chunk_images", "chunk_samples"])
def test_counts_below_one_are_refused(machine, name):
    counts = {"num_samples": 1, name: 0}
    with pytest.raises(ValueError, match=f"expected {name} >= 1, got 0"):
        log_likelihood_bounds(*networks(machine), EVERY_IMAGE, **counts)


def test_the_baseline_scores_each_pixel_by_its_training_mean():
    mean = torch.tensor([0.25, 0.5, 0.9], dtype=torch.float64)
    x = torch.tensor([[1, 0, 1], [0, 0, 0]], dtype=torch.uint8)
    expected = -math.log(0.25 * 0.5 * 0.9) - math.log(0.75 * 0.5 * 0.1)
    assert independent_bernoulli_nll(mean, x) == pytest.approx(expected / 2)


def test_the_baseline_holds_no_pixel_impossible():
    nll = independent_bernoulli_nll(torch.zeros(1), torch.ones(1, 1))
    assert nll == pytest.approx(-math.log(0.001), rel=1e-4)
