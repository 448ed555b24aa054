"""Check training on problems with exact answers. The problems test densities, gradients and objectives together.

The expected values were computed by quadrature, and checked with an independent integrator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, product

import torch
from torch import Tensor, nn

from wakesleep_ext import ops
from wakesleep_ext.check import calibration
from wakesleep_ext.check.training import (
    Effort,
    Fixed,
    Keys,
    Networks,
    Pixelwise,
    Table,
    machine,
    minimise,
    sleep,
)
from wakesleep_ext.evaluation.annealing import annealed_log_likelihood
from wakesleep_ext.evaluation.bounds import independent_bernoulli_nll, log_likelihood_bounds
from wakesleep_ext.helmholtz.conditionals import GaussianConditional, StandardGaussianPrior
from wakesleep_ext.helmholtz.config import ModelConfig
from wakesleep_ext.helmholtz.models import GenerativeNetwork, HelmholtzMachine, RecognitionNetwork
from wakesleep_ext.helmholtz.objectives import elbo_loss, sleep_phi_loss, wake_theta_loss
from wakesleep_ext.training.config import TrainConfig
from wakesleep_ext.training.data import Images
from wakesleep_ext.training.trainer import Trainer


@dataclass(frozen=True)
class Answer:
    """An expected value, and the computed value."""

    problem: str
    quantity: str
    expected: float
    got: float
    below: float
    """How far `got` may lie below `expected`."""
    above: float
    """How far `got` may lie above `expected`."""

    @property
    def passed(self) -> bool:
        return -self.below <= self.got - self.expected <= self.above  # false for NaN


@dataclass
class Check:
    """The options of a check, and its calibration ranks, keyed by problem name."""

    quick: bool
    ranks: dict[str, Tensor]

    def effort(self, steps: int, draws: int) -> Effort:
        """Return the amount of training: `steps` in a quick check, and four times as many in a full check."""
        return Effort(steps if self.quick else 4 * steps, draws)


def near(
    problem: str, quantities: str | list[str], expected: float | Tensor | list[float], got: Tensor, tolerance: float
) -> Iterator[Answer]:
    """Yield an answer for each element of `got`, with the same tolerance above and below `expected`."""
    wanted, found = torch.as_tensor(expected, dtype=torch.float64).flatten(), got.detach().double().flatten()
    names = [quantities] * len(found) if isinstance(quantities, str) else quantities
    for name, one, other in zip(names, wanted.expand_as(found).tolist(), found.tolist(), strict=True):
        yield Answer(problem, name, one, other, tolerance, tolerance)


# ---- one network at a time -------------------------------------------------------------------------------------------


def constant_decoder(check: Check) -> Iterator[Answer]:
    """Pixels do not depend on z, so the posterior is the prior. If q is the prior, importance weights are constant."""
    problem = "1 decoder constant in z"
    bias = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    recognition = Pixelwise(3)
    networks = machine(recognition, Fixed(lambda z: bias.expand(*z.shape[:-1], 3)), 3)
    sleep(networks, check.effort(300, 10_000))
    parameters = torch.stack((recognition.when_off, recognition.when_on))
    yield from near(problem, "largest |mu|, |logvar|", 0.0, parameters.abs().max(), 0.02)

    x = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    exact = ops.bernoulli_log_prob(bias, x)
    bounds = log_likelihood_bounds(*networks, x, 1000)
    yield from near(problem, "log p(x)", exact, bounds.log_likelihood, 0.02)
    yield from _calibrated(check, problem, networks)

    with torch.no_grad():
        for parameter in recognition.parameters():
            parameter.zero_()
    bounds = log_likelihood_bounds(*networks, x, 3)
    yield from near(problem, "log p(x), q = prior", exact, bounds.log_likelihood, 1e-12)
    yield from near(
        problem, "spread of log w, q = prior", 0.0, (bounds.log_likelihood - bounds.elbo).abs().max(), 1e-12
    )


def one_pixel(check: Check) -> Iterator[Answer]:
    """Test models of one pixel with logit c z, for five slopes c. With c = 1e6, x is 1 if z > 0 and 0 otherwise."""
    problems = [*(f"3 one pixel, logit {c} z" for c in (1, 2, 4, 8)), "2 x = 1[z > 0]"]
    slopes = torch.tensor([1.0, 2.0, 4.0, 8.0, 1e6], dtype=torch.float64)
    mean = torch.tensor([0.413242, 0.605706, 0.729478, 0.778403, 0.797885], dtype=torch.float64)
    variance = torch.tensor([0.829231, 0.633121, 0.467863, 0.394089, 0.363380], dtype=torch.float64)
    recognition = Pixelwise(5)
    sleep(machine(recognition, Fixed(lambda z: slopes * z), 5), check.effort(300, 10_000))
    for found, sign, x in ((recognition.when_on, 1, 1), (recognition.when_off, -1, 0)):
        for number, problem in enumerate(problems):
            yield from near(problem, f"mu(x = {x})", sign * mean[number], found[0, number], 0.02)
            yield from near(problem, f"variance(x = {x})", variance[number], found[1, number].exp(), 0.02)


def two_modes(check: Check) -> Iterator[Answer]:
    """Test a posterior with two modes: the sleep phase must cover both modes, and the ELBO must select one."""
    problem = "4 which KL: logit 6 z1 z2"
    recognition = Pixelwise(2)
    networks = machine(recognition, Fixed(lambda z: 6 * z.prod(-1, keepdim=True)), 2)
    x, keys, effort = torch.ones(1, 1, dtype=torch.float64), Keys(), check.effort(300, 10_000)
    sleep(networks, effort)
    mu, logvar = recognition.when_on
    yield from near(problem, ["sleep: mu 1", "sleep: mu 2"], 0.0, mu, 0.02)
    yield from near(problem, ["sleep: logvar 1", "sleep: logvar 2"], 0.0, logvar, 0.02)
    bounds = log_likelihood_bounds(*networks, x, 100_000, chunk_rows=10_000)
    yield from near(problem, "sleep: ELBO", -2.118842, bounds.elbo, 0.02)
    yield from near(problem, "log p(x)", -math.log(2), bounds.log_likelihood, 0.02)

    with torch.no_grad():
        recognition.when_on.fill_(0.3)
    losses = (elbo_loss(*networks, x, effort.draws, keys=keys(1)) for _ in range(effort.steps))
    minimise(losses, [recognition.when_on], effort.steps)
    mu, logvar = recognition.when_on
    yield from near(problem, ["ELBO: |mu 1|", "ELBO: |mu 2|"], 0.543, mu.abs(), 0.02)
    yield from near(problem, "ELBO: mu 1 and mu 2 of one sign", 1.0, (mu[0] * mu[1]).sign(), 0.0)
    yield from near(problem, ["ELBO: logvar 1", "ELBO: logvar 2"], -0.9676, logvar, 0.02)
    bounds = log_likelihood_bounds(*networks, x, 100_000, chunk_rows=10_000)
    yield from near(problem, "ELBO", -1.353046, bounds.elbo, 0.02)


# ---- both networks ---------------------------------------------------------------------------------------------------

SLOPES, OFFSETS = (2.0, -1.5, 1.0, 0.5), (0.0, 0.5, -0.5, 0.25)
EVERY_IMAGE = torch.tensor(list(product([0.0, 1.0], repeat=4)), dtype=torch.float64)
ONE_PROBLEM = "5 four pixels, logits a z + b"


def joint_fixed_points(check: Check) -> Iterator[Answer]:
    """Test where each algorithm converges on data from a known model: four pixels depend on one latent variable."""
    data_log_prob = _log_marginal(_linear(SLOPES, OFFSETS)).detach()
    data = data_log_prob.exp()
    yield from near(ONE_PROBLEM, "entropy", 2.6138498, -(data * data_log_prob).sum(), 1e-6)
    yield from _sleep_optimum(check, data)
    generative = machine(Table(4, 2), _linear(SLOPES, OFFSETS), 1)[1]
    annealed = annealed_log_likelihood(generative, EVERY_IMAGE, 100, 100)
    deviation = (annealed.log_likelihood - data_log_prob) / annealed.standard_error
    yield from near(ONE_PROBLEM, "AIS: largest error / standard error", 0.0, deviation.abs().max(), 4.0)

    # the batch repeats each image in proportion to its probability, so the losses have no sampling noise
    effort = check.effort(1500, 4000)
    images = EVERY_IMAGE.repeat_interleave((effort.draws * data).round().long(), 0)
    for name, expected, losses in (
        ("exact maximum likelihood", 2.613850, lambda n: _exact_losses(n, data)),
        ("VAE", 2.614147, lambda n: _elbo_losses(n, images)),
        ("plain wake-sleep", 2.614335, lambda n: _wake_sleep_losses(n, images)),
    ):
        networks = machine(Table(4, 2), _linear((1.0, -1.0, 0.5, 0.5), (0.0,) * 4), 1)
        minimise(losses(networks), chain(*(n.parameters() for n in networks)), effort.steps)
        linear = _network(networks)
        nll = -(data * _log_marginal(linear)).sum()
        yield from near(ONE_PROBLEM, f"NLL, {name}", expected, nll, 2e-4)
    slopes = linear.weight.flatten() * linear.weight[0].sign()
    names = [f"plain wake-sleep: a{number}" for number in range(1, 5)]
    yield from near(ONE_PROBLEM, names, [1.7463, -1.4586, 0.9942, 0.5034], slopes, 0.02)


def _sleep_optimum(check: Check, data: Tensor) -> Iterator[Answer]:
    """Test the optimum of the sleep phase alone, on dreams of the generative network that defines the data."""
    recognition = Table(4, 2)
    networks = machine(recognition, _linear(SLOPES, OFFSETS), 1)
    sleep(networks, check.effort(500, 10_000))
    for x, expected in (("0000", [-0.314768, 0.423816]), ("1011", [1.184195, 0.507982])):
        mu, logvar = recognition.rows[int(x, 2)]
        yield from near(ONE_PROBLEM, [f"mu*({x})", f"variance*({x})"], expected, torch.stack((mu, logvar.exp())), 0.02)

    z, log_weight = _quadrature()
    with torch.no_grad():
        log_joint = log_weight + ops.bernoulli_log_prob(_network(networks)(z), EVERY_IMAGE)
        # replace the weight of each quadrature node by the density of z
        log_posterior = log_joint - log_weight + ops.standard_gaussian_log_prob(z) - data.log()
        log_q = networks[0].log_prob([z.expand(-1, len(EVERY_IMAGE), -1)], EVERY_IMAGE)
        loss, kl = -(log_joint.exp() * log_q).sum(), (log_joint.exp() * (log_posterior - log_q)).sum()
    yield from near(ONE_PROBLEM, "floor of the sleep loss", 1.0261469, loss, 2e-4)
    yield from near(ONE_PROBLEM, "E KL(p(z|x) || q*)", 0.0034776, kl, 2e-4)


def _exact_losses(networks: Networks, data: Tensor) -> Iterator[Tensor]:
    while True:
        yield -(data * _log_marginal(_network(networks))).sum()


def _elbo_losses(networks: Networks, x: Tensor) -> Iterator[Tensor]:
    keys = Keys()
    while True:
        yield elbo_loss(*networks, x, keys=keys(1))


def _wake_sleep_losses(networks: Networks, x: Tensor) -> Iterator[Tensor]:
    keys = Keys()
    while True:
        yield wake_theta_loss(*networks, x, keys=keys(1)) + sleep_phi_loss(*networks, len(x), keys=keys(2))


def _linear(slopes: tuple[float, ...], offsets: tuple[float, ...]) -> nn.Linear:
    linear = nn.Linear(1, len(slopes), dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(slopes)[:, None])
        linear.bias.copy_(torch.tensor(offsets))
    return linear


def _network(networks: Networks) -> nn.Linear:
    network = networks[1][0].network
    assert isinstance(network, nn.Linear)
    return network


@cache
def _quadrature(nodes: int = 80) -> tuple[Tensor, Tensor]:
    """Return quadrature nodes `[A, 1, 1]` and their log weights `[A, 1]` for expectations under N(0, 1)."""
    import numpy as np

    z, weights = np.polynomial.hermite_e.hermegauss(nodes)
    return torch.tensor(z)[:, None, None], torch.tensor(weights / math.sqrt(2 * math.pi)).log()[:, None]


def _log_marginal(network: nn.Module) -> Tensor:
    """Return log p(x) of every image, `[16]`."""
    z, log_weight = _quadrature()
    return (log_weight + ops.bernoulli_log_prob(network(z), EVERY_IMAGE)).logsumexp(0)


# ---- calibration -----------------------------------------------------------------------------------------------------


def stationarity(check: Check) -> Iterator[Answer]:
    """Test moment identities. If the networks have output biases, these hold at any optimum, whatever the capacity."""
    problem = "6 moments at an optimum"
    torch.manual_seed(0)
    whole = HelmholtzMachine.from_config(ModelConfig(16, (2,), (32,), (16,))).double()
    with torch.no_grad():
        for parameter in whole.generative.parameters():
            parameter.mul_(3)
    networks = whole.recognition, whole.generative
    sleep(networks, check.effort(500, 4000), 0.03)
    (z,), x = whole.dream(100_000, keys=Keys(1)(2))
    with torch.no_grad():
        q = whole.recognition[0](x)
        pull, square = (z - q.mu) * (-q.logvar).exp(), (z - q.mu) ** 2 * (-q.logvar).exp()
    yield from near(problem, ["sleep: E (z1-mu1)/var1", "sleep: E (z2-mu2)/var2"], 0.0, pull.mean(0), 0.02)
    yield from near(problem, ["sleep: E (z1-mu1)^2/var1", "sleep: E (z2-mu2)^2/var2"], 1.0, square.mean(0), 0.03)

    keys, effort = Keys(2), check.effort(500, 2000)
    data = (torch.rand(effort.draws, 16, generator=torch.Generator().manual_seed(0)) < 0.3).double()
    data[:, :8] = data[:, :1]
    losses = (wake_theta_loss(*networks, data, keys=keys(1)) for _ in range(effort.steps))
    minimise(losses, whole.generative.parameters(), effort.steps, 0.03)
    latents = whole.recognition.rsample(data, 50, keys=keys(1))
    means = whole.generative.pixel_means(latents[0]).mean((0, 1))
    yield from near(problem, "wake: largest |E s(a) - pixel mean|", 0.0, (means - data.mean(0)).abs().max(), 0.02)


def linear_gaussian(check: Check) -> Iterator[Answer]:
    """x ~ N(z, s^2): the posterior is Gaussian, so q can match it exactly."""
    problem, variance = "8 linear-Gaussian", 0.25
    network = nn.Linear(1, 2)
    generative = Fixed(lambda z: torch.cat((z, torch.full_like(z, math.log(variance))), -1))
    networks = (
        RecognitionNetwork([GaussianConditional(network)]).double(),
        GenerativeNetwork([GaussianConditional(generative), StandardGaussianPrior(1)]).double(),
    )
    sleep(networks, check.effort(400, 10_000))
    found = torch.stack((network.weight[0, 0], network.bias[0], network.weight[1, 0], network.bias[1].exp()))
    names = ["slope of mu", "offset of mu", "slope of logvar", "variance"]
    yield from near(problem, names, [1 / (1 + variance), 0.0, 0.0, variance / (1 + variance)], found, 0.02)
    yield from _calibrated(check, problem, networks)
    with torch.no_grad():
        network.bias[1] -= math.log(2)
    p_value = calibration.uniformity(calibration.ranks(networks, 10_000)[:, 0])
    yield Answer(problem, "p-value of ranks, q's variance halved", 0.0, p_value, 0.0, 0.01)


def _calibrated(check: Check, problem: str, networks: Networks) -> Iterator[Answer]:
    found = calibration.ranks(networks, 10_000)
    for number, of_latent in enumerate(found.unbind(1), 1):
        check.ranks[f"{problem}, z{number}"] = of_latent
        yield Answer(problem, f"p-value of ranks, z{number}", 1.0, calibration.uniformity(of_latent), 0.99, 0.0)


# ---- data ------------------------------------------------------------------------------------------------------------


def bars(check: Check) -> Iterator[Answer]:
    """Train on images of bars: vertical with probability 2/3, and horizontal otherwise.

    Each bar is on with probability 0.2. The 1,875 training images represent this distribution exactly.
    """
    problem = "7 bars 4x4"
    images = bar_images()
    _, counts = images.grey.unique(dim=0, return_counts=True)
    share = counts.double() / len(images)
    entropy = -(share * share.log()).sum()
    yield from near(problem, "number of images", 30.0, torch.tensor(float(len(share))), 0.0)
    yield from near(problem, "entropy", 2.376389, entropy, 1e-6)
    baseline = independent_bernoulli_nll(images.mean(), images.grey)
    yield from near(problem, "NLL of independent pixels", 8.006439, torch.tensor(baseline), 1e-5)

    torch.manual_seed(0)
    whole = HelmholtzMachine.from_config(ModelConfig(16, (8,), (64,), (64,)), images.mean())
    config = TrainConfig(
        objective="reweighted-wake-sleep",
        num_samples=10,
        epochs=75 if check.quick else 300,
        generative_learning_rate=1e-2,
        recognition_learning_rate=1e-2,
        learning_rate_decay=0.03,
        adam_epsilon=1e-8,
    )
    for _ in Trainer(whole, images, config).epochs():
        pass
    bounds = log_likelihood_bounds(whole.recognition, whole.generative, images.grey, 500)
    nll = -bounds.log_likelihood.mean().item()
    yield Answer(problem, "NLL of a trained machine", entropy.item(), nll, 0.01, 0.7)


def bar_images() -> Images:
    """Return images in which each distinct image occurs in proportion to its probability, `[1875, 16]`."""
    pictures = []
    for on in product([0, 1], repeat=4):
        copies = 4 ** (4 - sum(on))
        columns = torch.tensor(on, dtype=torch.uint8).expand(4, 4)
        pictures += [columns] * (2 * copies) + [columns.T] * copies
    return Images(torch.stack(pictures).flatten(1), white=1, shape=(4, 4))


PROBLEMS: tuple[Callable[[Check], Iterator[Answer]], ...] = (
    constant_decoder,
    one_pixel,
    two_modes,
    joint_fixed_points,
    stationarity,
    bars,
    linear_gaussian,
)
