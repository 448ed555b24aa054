"""Compare every objective with its exact expectation, over all images and all z, or by quadrature."""

import itertools
import math

import numpy as np
import pytest
import torch
from exact import is_discrete, sizes
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

from wakesleep_ext.densities import Bernoulli as Logits
from wakesleep_ext.densities import Gaussian, StandardGaussian
from wakesleep_ext.helmholtz.conditionals import BernoulliConditional, GaussianConditional, StandardGaussianPrior
from wakesleep_ext.helmholtz.config import ModelConfig
from wakesleep_ext.helmholtz.models import GenerativeNetwork, HelmholtzMachine, RecognitionNetwork
from wakesleep_ext.helmholtz.networks import Constant
from wakesleep_ext.helmholtz.objectives import (
    dreg_loss,
    elbo_loss,
    iwae_loss,
    reweighted_wake_losses,
    sleep_phi_loss,
    vimco_loss,
    wake_theta_loss,
)
from wakesleep_ext.random import make_key

D = 3
EVERY_IMAGE = torch.tensor(list(itertools.product([0.0, 1.0], repeat=D)), dtype=torch.float64)
SOME_IMAGES = EVERY_IMAGE[[1, 4, 6]]

CONFIGS = {
    "one Gaussian layer": ModelConfig(D, (1,), (4,), (4,)),
    "two Gaussian layers": ModelConfig(D, (1, 1), (4,), (4,), (3,)),
    "two Bernoulli layers": ModelConfig(D, (2, 1), (4,), (4,), (), "bernoulli"),
}
DIFFERENTIABLE = [name for name, config in CONFIGS.items() if config.latents == "gaussian"]


def make_machine(name):
    """Make a small machine, far from its initial state."""
    torch.manual_seed(0)
    machine = HelmholtzMachine.from_config(CONFIGS[name], torch.tensor([0.2, 0.5, 0.7]))
    with torch.no_grad():
        for parameter in machine.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return machine.double()


@pytest.fixture
def machine():
    return make_machine("one Gaussian layer")


# ---- expectations ----------------------------------------------------------------------------------------------------
# A machine's latent variables as atoms, `[A, B, K]` for each layer, with weights `[A, B]` that make expectations sums.


def distribution(conditional, given):
    """Return a torch distribution with the parameters that the conditional's network returns."""
    if isinstance(conditional, StandardGaussianPrior):
        return Normal(torch.zeros(1, dtype=torch.float64), 1)
    output = conditional.network(given)
    if isinstance(conditional, BernoulliConditional):
        return Bernoulli(logits=output)
    mu, logvar = output.chunk(2, -1)
    return Normal(mu, (logvar / 2).exp())


def log_prob(chain, latents, x):
    x = x.expand(*latents[0].shape[:-1], D)
    return sum(distribution(c, given).log_prob(value).sum(-1) for c, value, given in chain.factors(latents, x))


def quadrature(layers):
    """Return nodes `[A]` for each layer, and weights `[A]` of the standard Gaussian."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60 if layers == 1 else 24)
    nodes, weights = torch.tensor(nodes), torch.tensor(weights / math.sqrt(2 * math.pi))
    grid, of_grid = (torch.cartesian_prod(*[values] * layers).view(-1, layers) for values in (nodes, weights))
    return grid.T, of_grid.prod(-1)


def every_state(widths):
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=sum(widths))), dtype=torch.float64)
    return states.split(widths, -1)


def recognised(machine, x):
    """Return all z with q(z|x), differentiable if q is."""
    if is_discrete(machine):
        latents = [z[:, None].expand(-1, len(x), -1) for z in every_state(sizes(machine))]
        return latents, log_prob(machine.recognition, latents, x).exp().detach()
    noise, weights = quadrature(len(machine.recognition))
    given, latents = x.expand(noise.shape[1], *x.shape), []
    for conditional, epsilon in zip(machine.recognition, noise, strict=True):
        q = distribution(conditional, given)
        given = q.mean + q.stddev * epsilon[:, None, None]
        latents.append(given)
    return latents, weights[:, None].expand(-1, len(x))


def imagined(machine):
    """Return all z with p(z), for one image."""
    if is_discrete(machine):
        latents = [z[:, None] for z in every_state(sizes(machine))]
        return latents, log_prior(machine, latents).exp().detach()
    noise, weights = quadrature(len(machine.recognition))
    given, latents = None, []
    for conditional, epsilon in zip(reversed(list(machine.generative)[1:]), noise, strict=True):
        p = distribution(conditional, given)
        given = p.mean + p.stddev * epsilon[:, None, None]
        latents.insert(0, given)
    return detached(latents), weights[:, None]


def log_prior(machine, latents):
    factors = zip(list(machine.generative)[1:], latents, [*latents[1:], None], strict=True)
    return sum(distribution(c, given).log_prob(value).sum(-1) for c, value, given in factors)


def detached(latents):
    return [z.detach() for z in latents]


def exact_wake_loss(machine, x):
    latents, weights = recognised(machine, x)
    log_joint = log_prob(machine.generative, detached(latents), x)
    if not is_discrete(machine):  # the topmost prior is left out
        log_joint = log_joint - Normal(0, 1).log_prob(latents[-1].detach()).sum(-1)
    return -(weights * log_joint).sum(0).mean()


def exact_sleep_loss(machine):
    latents, weights = imagined(machine)
    with torch.no_grad():
        pixels = distribution(machine.generative[0], latents[0])
        p_x_given_z = pixels.log_prob(EVERY_IMAGE).sum(-1).exp()  # [A, 2^D]
    latents = [z.expand(-1, len(EVERY_IMAGE), -1) for z in latents]
    return -(weights * p_x_given_z * log_prob(machine.recognition, latents, EVERY_IMAGE)).sum()


def exact_elbo_loss(machine, x):
    latents, weights = recognised(machine, x)
    log_w = log_prob(machine.generative, latents, x) - log_prob(machine.recognition, latents, x)
    return -(weights * log_w).sum(0).mean()


def of_pairs(weights, log_w):
    """Return the bounds of all pairs of independent samples, and their probabilities, `[A, A, B]`."""
    one, other = log_w[:, None], log_w[None]
    return torch.logaddexp(one, other) - math.log(2), weights[:, None] * weights[None]


def exact_iwae_loss(machine, x):
    """Return the exact loss for L = 2."""
    latents, weights = recognised(machine, x)
    log_w = log_prob(machine.generative, latents, x) - log_prob(machine.recognition, latents, x)
    bound, probability = of_pairs(weights, log_w)
    return -(probability * bound).sum((0, 1)).mean()


def exact_reweighted_losses(machine, x, share=0.0):
    """Return the exact losses for L = 2, with samples from (1 - share) q(z|x) + share p(z)."""
    latents, weights = recognised(machine, x)
    latents, weights = detached(latents), (1 - share) * weights
    if share:
        others, of_others = imagined(machine)
        latents = [torch.cat((z, o.expand(-1, len(x), -1))) for z, o in zip(latents, others, strict=True)]
        weights = torch.cat((weights, share * of_others.expand(-1, len(x))))
    log_q = log_prob(machine.recognition, latents, x)
    log_proposal = log_q.detach()
    if share:
        log_proposal = torch.logaddexp(
            log_proposal + math.log(1 - share), log_prior(machine, latents) + math.log(share)
        )
    log_w = log_prob(machine.generative, latents, x) - log_proposal.detach()
    bound, probability = of_pairs(weights, log_w)
    first = torch.sigmoid(log_w[:, None] - log_w[None]).detach()  # normalised weight of the first of the pair
    theta = -(probability * bound).sum((0, 1)).mean()
    phi = -(probability * (first * log_q[:, None] + (1 - first) * log_q[None])).sum((0, 1)).mean()
    return theta, phi


def gradients(loss, network):
    return dict(
        zip(
            (name for name, _ in network.named_parameters()),
            torch.autograd.grad(loss, list(network.parameters()), retain_graph=True),
            strict=True,
        )
    )


def assert_same(sampled, exact, *networks, atol=0.02):
    """Check the value, and the gradient of each network."""
    torch.testing.assert_close(sampled, exact, rtol=0, atol=atol)
    for network in networks:
        torch.testing.assert_close(gradients(sampled, network), gradients(exact, network), rtol=0, atol=atol)


SCORES = [("score", 0.0), ("score", 0.3), ("score-cv", 0.0)]
PATHWISE = ["dreg", "stl"]
COPIES = 200_000
MANY = SOME_IMAGES.repeat(COPIES // len(SOME_IMAGES), 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_wake_loss_and_its_gradient_are_unbiased(name):
    machine = make_machine(name)
    sampled = wake_theta_loss(machine.recognition, machine.generative, MANY, 2)
    assert_same(sampled, exact_wake_loss(machine, SOME_IMAGES), machine.generative)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_sleep_loss_and_its_gradient_are_unbiased(name):
    machine = make_machine(name)
    sampled = sleep_phi_loss(machine.recognition, machine.generative, COPIES)
    assert_same(sampled, exact_sleep_loss(machine), machine.recognition)


@pytest.mark.parametrize(
    ("name", "phi_gradient", "share"),
    [
        *((name, phi_gradient, share) for name in CONFIGS for phi_gradient, share in SCORES),
        *((name, phi_gradient, 0.0) for name in DIFFERENTIABLE for phi_gradient in PATHWISE),
    ],
)
def test_reweighted_losses_and_gradients_have_the_exact_expectations(name, phi_gradient, share):
    machine = make_machine(name)
    sampled = reweighted_wake_losses(
        machine.recognition, machine.generative, MANY, 2, phi_gradient=phi_gradient, defensive_fraction=share
    )
    theta, phi = exact_reweighted_losses(machine, SOME_IMAGES, share)
    assert_same(sampled.theta, theta, machine.generative)
    if phi_gradient in PATHWISE:
        assert sampled.phi is None
        phi = phi + exact_iwae_loss(machine, SOME_IMAGES) if phi_gradient == "stl" else phi
        exact, found = (gradients(loss, machine.recognition) for loss in (phi, sampled.theta))
        torch.testing.assert_close(found, exact, rtol=0, atol=0.02)
    else:
        assert_same(sampled.phi, phi, machine.recognition)


def test_vimco_has_the_exact_expectation():
    machine = make_machine("two Bernoulli layers")
    sampled = vimco_loss(machine.recognition, machine.generative, MANY, 2)
    latents, _ = recognised(machine, SOME_IMAGES)
    log_q = log_prob(machine.recognition, latents, SOME_IMAGES)
    bound, probability = of_pairs(log_q.exp(), log_prob(machine.generative, latents, SOME_IMAGES) - log_q)
    assert_same(sampled, -(probability * bound).sum((0, 1)).mean(), machine.generative, machine.recognition)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize(
    ("loss", "exact", "num_samples"),
    [
        (elbo_loss, exact_elbo_loss, 1),
        (elbo_loss, exact_elbo_loss, 3),
        (iwae_loss, exact_iwae_loss, 2),
        (dreg_loss, exact_iwae_loss, 2),
    ],
)
def test_bounds_that_are_differentiated_through_the_draws(name, loss, exact, num_samples):
    machine = make_machine(name)
    sampled = loss(machine.recognition, machine.generative, MANY, num_samples)
    assert_same(sampled, exact(machine, SOME_IMAGES), machine.generative, machine.recognition)


def test_with_one_sample_every_bound_is_the_elbo(machine):
    arguments, keys = (machine.recognition, machine.generative, SOME_IMAGES, 1), [make_key(3)]
    bounds = [loss(*arguments, keys=keys) for loss in (iwae_loss, dreg_loss)]
    bounds.append(reweighted_wake_losses(*arguments, keys=keys).theta)
    torch.testing.assert_close(bounds, bounds[:1] * 3)


def test_vimco_compares_each_sample_with_the_geometric_mean_of_the_others():
    machine = make_machine("two Bernoulli layers")
    keys = [make_key(5, layer) for layer in range(2)]
    draws = machine.recognition.rsample_log_prob(SOME_IMAGES, 4, keys=keys, detach=True)
    log_q = sum(draw.log_q for draw in draws)
    w = (machine.generative.log_prob([draw.z for draw in draws], SOME_IMAGES) - log_q).exp()
    expected = -w.mean(0).log().mean()
    for sample in range(4):
        others = torch.cat((w[:sample], w[sample + 1 :])).detach()
        signal = w.detach().mean(0).log() - ((others.sum(0) + others.prod(0) ** (1 / 3)) / 4).log()
        expected = expected - (signal * (log_q[sample] - log_q[sample].detach())).mean()
    loss = vimco_loss(machine.recognition, machine.generative, SOME_IMAGES, 4, keys=keys)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, machine.recognition), gradients(expected, machine.recognition))


def test_reweighted_gradients_differ_in_noise_only():
    """On the same draws, the losses have equal values. Where q is near the posterior, a control variate and
    reparameterisation reduce the noise.
    """
    machine = make_machine("one Gaussian layer")
    with torch.no_grad():
        for parameter in machine.parameters():
            parameter *= 0.5
    networks, noise = (machine.recognition, machine.generative), {}
    exact = gradients(exact_reweighted_losses(machine, SOME_IMAGES)[1], machine.recognition)
    for phi_gradient in ("score", "score-cv", "dreg"):
        errors = []
        for seed in range(40):
            x, keys = SOME_IMAGES.repeat(20, 1), [make_key(seed)]
            theta, phi = reweighted_wake_losses(*networks, x, 2, phi_gradient=phi_gradient, keys=keys)
            score = reweighted_wake_losses(*networks, x, 2, keys=keys)
            torch.testing.assert_close(theta, score.theta)
            if phi is not None:
                torch.testing.assert_close(phi, score.phi)
            found = gradients(theta if phi is None else phi, machine.recognition)
            errors.append(sum((found[name] - exact[name]).square().sum() for name in exact))
        noise[phi_gradient] = torch.stack(errors).mean()
    assert noise["score"] > noise["score-cv"] > noise["dreg"]


@pytest.mark.parametrize("phi_gradient", PATHWISE)
def test_reparameterised_gradients_are_zero_where_q_is_the_posterior(phi_gradient):
    machine = make_machine("two Gaussian layers")
    with torch.no_grad():
        for parameter in machine.parameters():
            parameter.zero_()  # x does not depend on z, so the posterior is the prior; q is the prior too
    loss, _ = reweighted_wake_losses(*machine.children(), EVERY_IMAGE, 3, phi_gradient=phi_gradient)
    found = gradients(loss, machine.recognition)
    torch.testing.assert_close(found, {name: torch.zeros_like(g) for name, g in found.items()})
    score = reweighted_wake_losses(*machine.children(), EVERY_IMAGE, 3).phi
    assert sum(g.abs().sum() for g in gradients(score, machine.recognition).values()) > 0.1


@pytest.mark.parametrize(
    ("name", "num_samples", "options", "message"),
    [
        (
            "one Gaussian layer",
            1,
            {"phi_gradient": "dreg"},
            "num_samples of at least 2 with phi_gradient 'dreg', got 1",
        ),
        ("one Gaussian layer", 1, {"phi_gradient": "score-cv"}, "at least 2 with phi_gradient 'score-cv', got 1"),
        ("one Gaussian layer", 2, {"phi_gradient": "path"}, "expected phi_gradient to be one of .*, got 'path'"),
        (
            "one Gaussian layer",
            2,
            {"phi_gradient": "stl", "defensive_fraction": 0.1},
            "expected phi_gradient 'score' with defensive_fraction 0.1, got 'stl'",
        ),
        ("two Bernoulli layers", 2, {"phi_gradient": "dreg"}, "expected recognition to have differentiable draws"),
    ],
)
def test_reweighted_gradients_that_do_not_exist_are_refused(name, num_samples, options, message):
    with pytest.raises(ValueError, match=message):
        reweighted_wake_losses(*make_machine(name).children(), EVERY_IMAGE, num_samples, **options)


def test_vimco_needs_two_samples():
    with pytest.raises(ValueError, match="expected num_samples of at least 2 with vimco_loss, got 1"):
        vimco_loss(*make_machine("two Bernoulli layers").children(), EVERY_IMAGE, 1)


# ---- which network learns --------------------------------------------------------------------------------------------


def norms(loss, machine):
    """Return the gradient norms of recognition and generative network; None if the loss does not depend on one."""
    found = []
    for network in (machine.recognition, machine.generative):
        parts = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True, allow_unused=True)
        found.append(None if all(part is None for part in parts) else sum(part.abs().sum() for part in parts))
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_each_loss_of_wake_and_sleep_trains_one_network_only(name):
    machine = make_machine(name)
    networks = machine.recognition, machine.generative
    reweighted = reweighted_wake_losses(*networks, EVERY_IMAGE, 4)
    defensive = reweighted_wake_losses(*networks, EVERY_IMAGE, 4, defensive_fraction=0.2)
    controlled = reweighted_wake_losses(*networks, EVERY_IMAGE, 4, phi_gradient="score-cv")
    for loss in (wake_theta_loss(*networks, EVERY_IMAGE, 2), reweighted.theta, defensive.theta, controlled.theta):
        for_recognition, for_generative = norms(loss, machine)
        assert for_recognition is None
        assert for_generative > 0
    for loss in (sleep_phi_loss(*networks, 50), reweighted.phi, defensive.phi, controlled.phi):
        for_recognition, for_generative = norms(loss, machine)
        assert for_recognition > 0
        assert for_generative is None


def test_the_sum_of_both_reweighted_losses_teaches_recognition_something(machine):
    """If q in the weights were not detached, the gradients would cancel exactly. This test shows both cases."""
    x, num_samples, keys = EVERY_IMAGE, 4, [make_key(3)]
    theta, phi = reweighted_wake_losses(machine.recognition, machine.generative, x, num_samples, keys=keys)
    (draw,) = machine.recognition.rsample_log_prob(x, num_samples, keys=keys, detach=True)
    trap = math.log(num_samples) - (machine.generative.log_prob([draw.z], x) - draw.log_q).logsumexp(0).mean()
    torch.testing.assert_close(trap, theta)
    cancelled = gradients(trap + phi, machine.recognition)
    torch.testing.assert_close(cancelled, {name: torch.zeros_like(g) for name, g in cancelled.items()})
    torch.testing.assert_close(gradients(theta + phi, machine.recognition), gradients(phi, machine.recognition))
    assert norms(phi, machine)[0] > 0.1


def test_weights_belong_to_each_image(machine):
    """Each image's bound uses only its own samples: a batch has the mean of its rows' losses."""
    (draw,) = machine.recognition.rsample_log_prob(SOME_IMAGES, 5, keys=[make_key(1)])
    log_w = machine.generative.log_prob([draw.z], SOME_IMAGES) - draw.log_q
    bounds = [row.exp().mean().log() for row in log_w.unbind(1)]
    scores = [(row.exp() / row.exp().sum()) @ log_q for row, log_q in zip(log_w.T, draw.log_q.T, strict=True)]
    theta, phi = reweighted_wake_losses(machine.recognition, machine.generative, SOME_IMAGES, 5, keys=[make_key(1)])
    torch.testing.assert_close(theta, -torch.stack(bounds).mean())
    torch.testing.assert_close(phi, -torch.stack(scores).mean())


@pytest.mark.parametrize("loss", [elbo_loss, iwae_loss, dreg_loss])
def test_discrete_draws_cannot_be_differentiated(loss):
    machine = make_machine("two Bernoulli layers")
    with pytest.raises(ValueError, match="expected recognition to have differentiable draws, got BernoulliConditional"):
        loss(machine.recognition, machine.generative, EVERY_IMAGE, 2)


# ---- forms -----------------------------------------------------------------------------------------------------------


def test_wake_samples_are_averaged_evenly(machine):
    """L samples of one image equal one sample of L copies of it: the same draws, the same mean."""
    x, keys = EVERY_IMAGE[5:6], [make_key(7)]
    several = wake_theta_loss(machine.recognition, machine.generative, x, 6, keys=keys)
    copies = wake_theta_loss(machine.recognition, machine.generative, x.repeat(6, 1), 1, keys=keys)
    torch.testing.assert_close(several, copies)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.float64])
def test_losses_take_pixels_of_any_dtype(machine, dtype):
    for loss in (wake_theta_loss, elbo_loss, iwae_loss, dreg_loss):
        of_double, of_dtype = (
            loss(machine.recognition, machine.generative, x, 2, keys=[make_key(7)])
            for x in (EVERY_IMAGE, EVERY_IMAGE.to(dtype))
        )
        torch.testing.assert_close(of_dtype, of_double)


def test_losses_are_functions_of_their_keys(machine):
    networks = machine.recognition, machine.generative
    keys = [make_key(1, offset) for offset in range(3)]
    for loss, arguments, taken in (
        (wake_theta_loss, (EVERY_IMAGE,), 1),
        (sleep_phi_loss, (20,), 2),
        (lambda *a, **k: reweighted_wake_losses(*a, **k, defensive_fraction=0.5).theta, (EVERY_IMAGE, 4), 3),
        (elbo_loss, (EVERY_IMAGE,), 1),
        (iwae_loss, (EVERY_IMAGE, 2), 1),
        (dreg_loss, (EVERY_IMAGE, 2), 1),
    ):
        first, second = (loss(*networks, *arguments, keys=keys[:taken]) for _ in range(2))
        assert torch.equal(first, second)
        assert not torch.equal(loss(*networks, *arguments), loss(*networks, *arguments))


def test_only_the_divergence_of_a_gaussian_from_the_standard_one_has_a_formula():
    q, prior = Gaussian(torch.randn(5, 2), torch.randn(5, 2)), StandardGaussian(torch.zeros(2), torch.zeros(2))
    exact = kl_divergence(Independent(Normal(q.mu, (q.logvar / 2).exp()), 1), Independent(Normal(prior.mu, 1.0), 1))
    torch.testing.assert_close(prior.kl_from(q), exact)
    assert prior.kl_from(Logits(torch.zeros(5, 2))) is None
    assert q.kl_from(prior) is None


def test_a_learnt_prior_is_compared_by_the_draws(machine):
    """A prior N(0, I) with parameters gives the expected ELBO, and gradients for its parameters."""
    (draw,) = machine.recognition.rsample_log_prob(EVERY_IMAGE, 3, keys=[make_key(2)])
    prior = GaussianConditional(Constant(2)).double()
    learnt = GenerativeNetwork([machine.generative[0], prior])
    loss = elbo_loss(machine.recognition, learnt, EVERY_IMAGE, 3, keys=[make_key(2)])
    expected = (draw.log_q - machine.generative.log_prob([draw.z], EVERY_IMAGE)).mean()
    torch.testing.assert_close(loss, expected)
    assert gradients(loss, prior)["network.value"].abs().sum() > 0


def test_too_few_keys_are_refused(machine):
    with pytest.raises(ValueError, match="argument"):
        wake_theta_loss(machine.recognition, machine.generative, EVERY_IMAGE, keys=[])


def test_objectives_compile_without_graph_breaks(machine):
    torch.compiler.reset()
    networks, keys = (machine.recognition, machine.generative), [make_key(1, 0), make_key(1, 1)]
    for loss, arguments, taken, trained in (
        (wake_theta_loss, (EVERY_IMAGE, 4), 1, (machine.generative,)),
        (sleep_phi_loss, (20,), 2, (machine.recognition,)),
        (lambda *a, **k: sum(reweighted_wake_losses(*a, **k)), (EVERY_IMAGE, 4), 1, networks),
        (elbo_loss, (EVERY_IMAGE, 4), 1, networks),
        (iwae_loss, (EVERY_IMAGE, 4), 1, networks),
    ):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*networks, *arguments, keys=keys[:taken])
        eager = loss(*networks, *arguments, keys=keys[:taken])
        torch.testing.assert_close(compiled, eager)
        for network in trained:
            torch.testing.assert_close(gradients(compiled, network), gradients(eager, network))


def test_networks_may_be_any_modules():
    """The objectives need only the signatures of the two networks."""

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
    for loss in (wake_theta_loss, elbo_loss, iwae_loss, dreg_loss):
        assert loss(recognition, generative, torch.ones(5, 1), 3).shape == ()
    assert sleep_phi_loss(recognition, generative, 4).shape == ()


# ---- joint distributions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_joint_log_probabilities_are_those_of_the_factors_and_sum_to_one(name):
    machine = make_machine(name)
    latents, weights = recognised(machine, EVERY_IMAGE)
    log_q = machine.recognition.log_prob(latents, EVERY_IMAGE)
    log_joint = machine.generative.log_prob(latents, EVERY_IMAGE)
    torch.testing.assert_close(log_q, log_prob(machine.recognition, latents, EVERY_IMAGE))
    torch.testing.assert_close(log_joint, log_prob(machine.generative, latents, EVERY_IMAGE))

    latents, weights = imagined(machine)
    latents = [z.expand(-1, len(EVERY_IMAGE), -1) for z in latents]
    of_x = machine.generative.log_prob(latents, EVERY_IMAGE) - log_prior(machine, latents)
    assert (weights * of_x.exp()).sum().item() == pytest.approx(1)
    if is_discrete(machine):  # sums over every state are exact
        assert machine.generative.log_prob(latents, EVERY_IMAGE).exp().sum().item() == pytest.approx(1)
        total = machine.recognition.log_prob(latents, EVERY_IMAGE).exp().sum(0)
        torch.testing.assert_close(total, torch.ones_like(total))
