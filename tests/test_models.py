"""Test shapes and initial values of the networks, and ancestral sampling."""

import math
from functools import partial
from typing import get_args

import pytest
import torch
from torch import nn
from torch.func import vmap

from wakesleep_ext import ops
from wakesleep_ext.densities import Gaussian, LinearBernoulli
from wakesleep_ext.helmholtz.conditionals import (
    BernoulliConditional,
    GaussianConditional,
    LinearBernoulliConditional,
    StandardGaussianPrior,
)
from wakesleep_ext.helmholtz.config import Activation, ModelConfig
from wakesleep_ext.helmholtz.models import GenerativeNetwork, HelmholtzMachine, RecognitionNetwork
from wakesleep_ext.helmholtz.networks import MultilayerPerceptron
from wakesleep_ext.random import make_key

SMALL = ModelConfig(observed=6, latent=(2,), recognition_hidden=(5,), generative_hidden=(4, 3))


def test_packed_parameters_are_split_without_copying():
    q = HelmholtzMachine.from_config(SMALL).recognition[0](torch.ones(7, 6))
    mu, logvar = q.mu, q.logvar
    assert mu.shape == logvar.shape == (7, 2)
    assert mu.untyped_storage().data_ptr() == logvar.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.float64])
def test_pixels_of_any_dtype_are_recognised_alike(dtype):
    machine = HelmholtzMachine.from_config(SMALL)
    x = torch.tensor([[0, 1, 1, 0, 1, 0]])
    one, other = (machine.recognition[0](pixels) for pixels in (x.to(dtype), x.float()))
    torch.testing.assert_close((one.mu, one.logvar), (other.mu, other.logvar), rtol=0, atol=0)


def convolutions():
    """Return an encoder of 16 pixels and a decoder of two latent variables, which work on rows only."""
    to_maps, to_features = nn.Unflatten(1, (1, 4, 4)), nn.Unflatten(1, (3, 2, 2))
    encoder = nn.Sequential(to_maps, nn.Conv2d(1, 3, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4))
    decoder = nn.Sequential(nn.Linear(2, 12), nn.BatchNorm1d(12), to_features, nn.ConvTranspose2d(3, 1, 2, 2))
    return encoder, decoder


def test_networks_may_be_any_modules():
    machine = HelmholtzMachine.from_networks(*convolutions(), latent=2).eval()
    x = torch.rand(6, 16) < 0.5
    assert machine.dream(5).x.shape == (5, 16)
    (z,) = machine.recognition.rsample(x, num_samples=3)
    log_prob = machine.generative.log_prob([z], x)
    for sample, of_sample in zip(z, log_prob, strict=True):  # in one batch, or each sample alone
        torch.testing.assert_close(machine.generative.log_prob([sample], x), of_sample)
    assert machine.generative[0](z[0, 0]).mean.shape == (16,)


@pytest.mark.parametrize("returns", ["one row", "no rows"])
def test_a_network_that_mixes_rows_is_refused(returns):
    class Mixing(nn.Module):
        def forward(self, rows):
            return rows.mean(0, keepdim=True) if returns == "one row" else rows.mean()

    with pytest.raises(ValueError, match=r"BernoulliConditional: expected the network to return \[5, \.\.\.\] "):
        BernoulliConditional(Mixing())(torch.randn(5, 4))


@pytest.mark.parametrize("latents", ["gaussian", "bernoulli"])
def test_codes_are_moments_of_the_recognition_network(latents):
    machine = HelmholtzMachine.from_config(ModelConfig(6, (3, 2), (5,), (4,), (3,), latents))
    x = (torch.rand(7, 6) < 0.5).to(torch.uint8)
    first, second = machine.encode(x, chunk_rows=3)
    with torch.no_grad():
        q = machine.recognition[0](x)
        above = machine.recognition[1](q.mean)
        draws = above.rsample((100_000,))
    torch.testing.assert_close(first.mu, q.mean)
    torch.testing.assert_close(second.mu, draws.mean(0), rtol=0, atol=0.02)
    torch.testing.assert_close(second.logvar, draws.var(0).log(), rtol=0, atol=0.02)
    assert first.logvar.shape == (7, 3)
    with pytest.raises(ValueError, match="expected chunk_rows >= 1, got 0"):
        machine.encode(x, chunk_rows=0)


@pytest.mark.parametrize("activation", get_args(Activation))
def test_widths_and_activation_are_the_users(activation):
    config = ModelConfig(6, (2,), (5,), (4, 3), activation=activation)
    machine = HelmholtzMachine.from_config(config)
    assert [tuple(p.shape) for p in machine.recognition.parameters() if p.dim() == 2] == [
        (5, 6),
        (4, 5),
    ]
    assert [tuple(p.shape) for p in machine.generative.parameters() if p.dim() == 2] == [
        (4, 2),
        (3, 4),
        (6, 3),
    ]
    networks = machine.recognition[0].network, machine.generative[0].network
    assert {type(m).__name__.lower() for network in networks for m in network} == {"linear", activation}


def test_no_hidden_layers_give_linear_networks():
    machine = HelmholtzMachine.from_config(ModelConfig(6, (2,), (), ()))
    z = torch.randn(3, 2)
    logits = machine.generative[0].network
    torch.testing.assert_close(logits(2 * z), 2 * logits(z))


def test_the_generative_bias_starts_at_the_logit_of_the_clipped_pixel_mean():
    mean = torch.tensor([0.0, 0.0005, 0.25, 0.5, 0.9995, 1.0])
    bias = HelmholtzMachine.from_config(SMALL, mean).generative[0].network.head.bias
    expected = torch.tensor([0.001, 0.001, 0.25, 0.5, 0.999, 0.999])
    torch.testing.assert_close(bias.sigmoid(), expected, rtol=1e-5, atol=0)


def test_a_pixel_mean_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"pixel_mean to have shape \[6\], got \[5\]"):
        HelmholtzMachine.from_config(SMALL, torch.zeros(5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observed": 0}, "observed > 0, got 0"),
        ({"latent": (-1,)}, r"latent > 0, got \(-1,\)"),
        ({"latent": (2.5,)}, r"latent > 0, got \(2.5,\)"),
        ({"recognition_hidden": (3, 0)}, r"recognition_hidden > 0, got \(3, 0\)"),
        ({"generative_hidden": (0,)}, r"generative_hidden > 0, got \(0,\)"),
        ({"latent_hidden": (0,)}, r"latent_hidden > 0, got \(0,\)"),
        ({"latent": ()}, r"latent to name at least one layer, got \(\)"),
        ({"latent": 2}, "latent to be a tuple of sizes, got 2"),
        ({"latents": "poisson"}, "latents to be one of gaussian, bernoulli, got 'poisson'"),
        ({"activation": "swish"}, "activation to be one of tanh, .*, got 'swish'"),
        ({"logvar_bounds": (1.0, 1.0)}, r"ModelConfig: .* two finite numbers, the lower first, got \(1.0, 1.0\)"),
        ({"logvar_bounds": (-math.inf, 1.0)}, r"logvar_bounds to be two finite numbers, .* got \(-inf, 1.0\)"),
        ({"logvar_bounds": (0.0, math.nan)}, r"logvar_bounds to be two finite numbers, .* got \(0.0, nan\)"),
        ({"logvar_bounds": (1.0,)}, r"logvar_bounds to be two finite numbers, .* got \(1.0,\)"),
        ({"logvar_bounds": 1.0}, "logvar_bounds to be two finite numbers, .* got 1.0"),
        ({"logvar_bounds": ("0", "1")}, r"logvar_bounds to be two finite numbers, .* got \('0', '1'\)"),
        (
            {"logvar_bounds": (-1.0, 1.0), "latents": "bernoulli"},
            r"logvar_bounds None with latents 'bernoulli', got \(-1.0, 1.0\)",
        ),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{"observed": 6, **change})


def test_a_dream_is_drawn_from_the_prior_and_then_from_the_pixels():
    machine = HelmholtzMachine.from_config(SMALL, torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 0.99]))
    count = 100_000
    (z,), x = machine.dream(count, keys=(make_key(0, 0), make_key(0, 1)))
    assert not z.requires_grad
    assert not x.requires_grad
    assert x.unique().tolist() == [0, 1]

    five_sigma = 5 / count**0.5
    torch.testing.assert_close(z.mean(0), torch.zeros(2), rtol=0, atol=five_sigma)
    torch.testing.assert_close(z.T.cov(), torch.eye(2), rtol=0, atol=five_sigma * 2**0.5)
    means = machine.generative.pixel_means(z)
    torch.testing.assert_close(x.mean(0), means.mean(0), rtol=0, atol=five_sigma / 2)
    # Pixels follow their own z, not another's: the covariance of x with its mean is the latter's.
    torch.testing.assert_close(((x - means) * means).mean(0), torch.zeros(6), rtol=0, atol=five_sigma / 2)


def test_a_dream_is_a_function_of_its_keys():
    machine = HelmholtzMachine.from_config(SMALL)
    keys = make_key(3, 0), make_key(3, 1)
    first, second = machine.dream(9, keys=keys), machine.dream(9, keys=keys)
    assert torch.equal(first.latents[0], second.latents[0])
    assert torch.equal(first.x, second.x)
    assert not torch.equal(machine.dream(9).latents[0], machine.dream(9).latents[0])


def test_dreams_take_the_dtype_of_the_generative_network():
    (z,), x = HelmholtzMachine.from_config(SMALL).double().dream(3)
    assert z.dtype == x.dtype == torch.float64


def test_an_mlp_is_scored_and_drawn_from_without_its_logits():
    """Other networks go through their logits. Both ways have the same gradients."""
    network = HelmholtzMachine.from_config(SMALL).generative[0].network.double()
    mlp, any_other = LinearBernoulliConditional(network), BernoulliConditional(network)
    z, x = torch.randn(4, 3, 2, dtype=torch.float64), torch.randint(2, (3, 6))
    x = x.to(torch.uint8)
    torch.testing.assert_close(mlp(z).log_prob(x), any_other(z).log_prob(x))
    for sample_shape in ((), (2,)):
        draws = [conditional(z).rsample(sample_shape, key=make_key(1)) for conditional in (mlp, any_other)]
        assert torch.equal(*draws)
    assert type(mlp(z)) is LinearBernoulli
    weights = torch.randn(4, 1, dtype=torch.float64)
    ours, theirs = (conditional(z).log_prob_sum(x, weights) for conditional in (mlp, any_other))
    torch.testing.assert_close(ours, theirs)
    parameters = tuple(network.parameters())
    torch.testing.assert_close(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters))

    seen = []
    for module in (network, network.head):
        module.register_forward_hook(lambda *call: seen.append(call[-1]))
    torch.testing.assert_close(mlp(z).log_prob_sum(x, weights), theirs)
    assert [tuple(logits.shape) for logits in seen] == [(4, 3, 6)] * 2  # a hook still gets what it waits for


def test_a_layer_of_somebodys_own_computes_what_it_computes():
    class Doubled(torch.nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    z, x = torch.randn(3, 2), torch.randint(2, (3, 6)).float()
    for name in ("0", "2"):
        network = HelmholtzMachine.from_config(SMALL).generative[0].network
        plain = getattr(network, name)
        setattr(network, name, Doubled(plain.in_features, plain.out_features))
        getattr(network, name).load_state_dict(plain.state_dict())
        expected = torch.nn.Sequential.forward(network, z)
        torch.testing.assert_close(network(z), expected)
        log_prob = LinearBernoulliConditional(network)(z).log_prob(x)
        torch.testing.assert_close(log_prob, torch.distributions.Bernoulli(logits=expected).log_prob(x).sum(-1))


@pytest.mark.parametrize("activation", get_args(Activation))
def test_layers_are_fused_and_the_same(activation):
    network = MultilayerPerceptron((5, 4, 3, 2), activation)
    input = torch.randn(7, 5)
    torch.testing.assert_close(network(input), torch.nn.Sequential.forward(network, input))


class Wider(GaussianConditional):
    def forward(self, given):
        q = super().forward(given)
        return Gaussian(q.mu, q.logvar + 1)


def hooked(conditional):
    conditional.register_forward_hook(lambda module, inputs, q: Gaussian(q.mu, q.logvar + 1))
    return conditional


def multilayer_perceptron(*sizes):
    return MultilayerPerceptron(sizes, "tanh")


CONDITIONALS = {
    "an MLP": (lambda: GaussianConditional(multilayer_perceptron(6, 5, 4)), True),
    "bounds": (lambda: GaussianConditional(multilayer_perceptron(6, 5, 4), (-0.1, 0.1)), False),
    "a single layer": (lambda: GaussianConditional(multilayer_perceptron(6, 4)), False),
    "another network": (lambda: GaussianConditional(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))), False),
    "another forward": (lambda: Wider(multilayer_perceptron(6, 5, 4)), False),
    "a hook": (lambda: hooked(GaussianConditional(multilayer_perceptron(6, 5, 4))), False),
    "Bernoulli": (lambda: BernoulliConditional(multilayer_perceptron(6, 5, 4)), False),
}


@pytest.mark.parametrize(("make", "may_be_fused"), CONDITIONALS.values(), ids=CONDITIONALS)
def test_draws_are_those_of_the_distribution(make, may_be_fused, monkeypatch):
    """An op may draw from the output layer if no gradient is needed, and if nothing else follows that layer."""
    calls = []
    op = ops.linear_gaussian_rsample
    monkeypatch.setattr(ops, "linear_gaussian_rsample", lambda *args, **named: calls.append(1) or op(*args, **named))
    conditional, x, key = make(), torch.rand(7, 6).round(), make_key(3)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            found = conditional.rsample(x, (3,), key=key)
            assert torch.equal(found, conditional(x).rsample((3,), key=key))
        assert found.requires_grad == (enabled and conditional.has_rsample)
        assert len(calls) == (may_be_fused and not enabled)


def test_a_machine_is_made_of_any_two_networks():
    recognition = RecognitionNetwork([GaussianConditional(torch.nn.Linear(6, 4))])
    generative = GenerativeNetwork([BernoulliConditional(torch.nn.Linear(2, 6)), StandardGaussianPrior(2)])
    machine = HelmholtzMachine(recognition, generative)
    assert machine.recognition is recognition
    assert machine.generative is generative
    assert machine.reconstruct(machine.dream(5).x).shape == (5, 6)


def bounded_machine(kind):
    if kind == "convolutions":
        return HelmholtzMachine.from_networks(*convolutions(), latent=2, logvar_bounds=(-0.2, 0.1)).double()
    return HelmholtzMachine.from_config(ModelConfig(16, (3, 2), (5,), (4,), logvar_bounds=(-0.2, 0.1))).double()


def log_prob(conditional, given, value):
    return conditional(given).log_prob(value)


@pytest.mark.parametrize("kind", ["convolutions", "two layers"])
def test_log_variances_are_clamped_to_their_bounds(kind):
    """The log-densities and their gradients are those of torch.distributions, and the prior stays as it is."""
    machine = bounded_machine(kind)
    *of_latents, prior = [*machine.recognition, *machine.generative[1:]]
    x, z, scale = torch.rand(40, 16).double().round(), machine.dream(40).latents, torch.rand(40).double()
    assert len(of_latents) == 2 * len(z) - 1
    givens = (x, *z[:-1], *z[1:])
    for conditional, given, value in zip(of_latents, givens, (*z, *z[:-1]), strict=True):
        weights = list(conditional.parameters())
        mu, logvar = conditional.network(given.clone()).chunk(2, -1)
        assert 0 < (logvar < -0.2).double().mean() < 1
        assert 0 < (logvar > 0.1).double().mean() < 1
        normal = torch.distributions.Normal(mu, torch.exp(logvar.clamp(-0.2, 0.1) / 2))
        expected = normal.log_prob(value).sum(-1)
        q = conditional(given)
        torch.testing.assert_close(q.log_prob(value), expected)
        torch.testing.assert_close(vmap(partial(log_prob, conditional))(given, value), expected)
        of_expected = torch.autograd.grad((scale * expected).sum(), weights)
        torch.testing.assert_close(torch.autograd.grad(q.log_prob_sum(value, scale), weights), of_expected)
    assert not prior(None).logvar.any()
    assert all(code.logvar.min() == -0.2 and code.logvar.max() == 0.1 for code in machine.encode(x))


def test_reconstructions_are_pixel_means_and_a_function_of_the_key():
    machine = HelmholtzMachine.from_config(SMALL)
    x = torch.randint(2, (8, 6), dtype=torch.uint8)
    first, second = (machine.reconstruct(x, keys=[make_key(1)]) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (8, 6)
    assert ((first > 0) & (first < 1)).all()
