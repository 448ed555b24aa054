"""Helmholtz machines so small that their latent variables can be summed over, or integrated numerically."""

import itertools
import math

import numpy as np
import torch

from wakesleep_ext.helmholtz.config import ModelConfig
from wakesleep_ext.helmholtz.models import HelmholtzMachine
from wakesleep_ext.random import make_key


def every_binary(size):
    """Return all binary vectors, `[2**size, size]`."""
    return torch.tensor(list(itertools.product([0, 1], repeat=size)), dtype=torch.float64)


def sizes(machine):
    """Return the number of latent variables of each layer, from x up."""
    latents = machine.generative.sample_latents((), keys=[make_key(0)] * len(machine.recognition))
    return [z.shape[-1] for z in latents]


def is_discrete(machine):
    """Return true if the latent variables are Bernoulli, not Gaussian."""
    return not machine.recognition[0].has_rsample


def random_machine(latent, latents="gaussian", observed=3):
    """Make a float64 machine with weights and biases far from zero, but a q that is broad enough for importance
    sampling.
    """
    torch.manual_seed(0)
    machine = HelmholtzMachine.from_config(ModelConfig(observed, latent, (4,), (4,), (4,), latents)).double()
    with torch.no_grad():
        for parameter in machine.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
        for parameter in machine.recognition.parameters():
            parameter *= 0.6
    return machine


@torch.no_grad()
def prior_nodes(machine, points=60):
    """Return nodes z_1, ..., z_T `[S, 1, K]` and their log prior probabilities `[S, 1]`: all values, or the nodes of a
    quadrature.
    """
    _, *of_latents = machine.generative
    latents, log_weights = _nodes(machine, of_latents[::-1], None, points)
    return latents[::-1], log_weights


@torch.no_grad()
def recognition_nodes(machine, x, points=60):
    """Return nodes and log probabilities as :func:`prior_nodes`, but under q(z|x): `[S, N, K]` and `[S, N]`."""
    return _nodes(machine, machine.recognition, x, points)


def log_likelihood(machine, x, points=60):
    """Return log p(x), `[N]`."""
    (z, *_), log_weights = prior_nodes(machine, points)
    with torch.no_grad():
        return (machine.generative[0](z).log_prob(x) + log_weights).logsumexp(0)


def _nodes(machine, conditionals, given, points):
    of_layers = sizes(machine) if given is not None else sizes(machine)[::-1]
    discrete = is_discrete(machine)
    if discrete:
        values, log_weights = every_binary(sum(of_layers)), torch.zeros(1, dtype=torch.float64)
    else:
        values, log_weights = _hermite(sum(of_layers), points)
    latents, log_weights = [], log_weights.unsqueeze(-1)
    for conditional, value in zip(conditionals, values.unsqueeze(1).split(of_layers, -1), strict=True):
        p = conditional(given)
        given = value if discrete else p.from_noise(value)
        if discrete:
            log_weights = log_weights + p.log_prob(value)
        latents.append(given)
    return latents, log_weights


def _hermite(dimensions, points):
    """Return nodes `[points**dimensions, dimensions]` of N(0, I), and the logarithms of their weights."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    z = torch.cartesian_prod(*[torch.tensor(nodes)] * dimensions).view(-1, dimensions)
    log_weights = torch.tensor(weights / math.sqrt(2 * math.pi)).log()
    return z, torch.cartesian_prod(*[log_weights] * dimensions).view(-1, dimensions).sum(-1)
