"""Problems whose optimum is known, reached by training through the ops and the objectives.

The numbers were found by quadrature. Each recognition network is as small as the problem allows:
the parameters of q(z|x) for each value of a pixel, which is to say affine in it.
"""

import math

import torch
from torch import Tensor, nn

from wakesleep_ext.conditionals import BernoulliConditional, GaussianConditional, StandardGaussianPrior
from wakesleep_ext.evaluation import log_likelihood_bounds
from wakesleep_ext.models import GenerativeNetwork, RecognitionNetwork
from wakesleep_ext.objectives import elbo_loss, sleep_phi_loss
from wakesleep_ext.random import make_key

TOLERANCE = 0.02
PIXEL_OFF_AND_ON = torch.tensor([[0.0], [1.0]], dtype=torch.float64)


class Recognition(nn.Module):
    """q(z|x) whose packed parameters are affine in each pixel: x `[*, D]` to `[*, 2K]`.

    Each latent variable looks at one pixel: at its own where there are as many, else at the only
    one there is.
    """

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.when_off = nn.Parameter(torch.full((2, latent), 0.3, dtype=torch.float64))
        self.when_on = nn.Parameter(torch.full((2, latent), 0.3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        packed = torch.lerp(self.when_off, self.when_on, x.double().unsqueeze(-2))
        return packed.flatten(-2)


class Generative(nn.Module):
    """Fixed logits, a function of z."""

    def __init__(self, logits) -> None:
        super().__init__()
        self.logits = logits
        self.dtype = nn.Parameter(torch.zeros((), dtype=torch.float64), requires_grad=False)

    def forward(self, z: Tensor) -> Tensor:
        return self.logits(z)


def minimise(loss, parameters, steps=400, learning_rate=0.1):
    """Adam with a step size that falls to a hundredth of its start, to average out the noise."""
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / steps))
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        schedule.step()


def chains(recognition, generative, latent):
    """As the objectives and the bounds take them."""
    prior = StandardGaussianPrior(latent).double()
    return (
        RecognitionNetwork([GaussianConditional(recognition)]),
        GenerativeNetwork([BernoulliConditional(generative), prior]),
    )


def sleep(recognition, generative, latent, dreams=10_000):
    """Train the recognition network on dreams of a fixed generative network."""
    networks = chains(recognition, generative, latent)

    def loss(step):
        keys = make_key(0, 2 * step), make_key(0, 2 * step + 1)
        return sleep_phi_loss(*networks, dreams, keys=keys)

    minimise(loss, recognition.parameters())


def assert_near(actual, expected):
    torch.testing.assert_close(actual.detach(), torch.as_tensor(expected).to(actual), rtol=0, atol=TOLERANCE)


def test_1_a_decoder_that_ignores_z_leaves_the_prior():
    bias = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    generative = Generative(lambda z: bias.expand(*z.shape[:-1], 3))
    recognition = Recognition(latent=3)
    sleep(recognition, generative, latent=3)
    assert_near(recognition.when_off, torch.zeros(2, 3))
    assert_near(recognition.when_on, torch.zeros(2, 3))

    x = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    exact = (x * bias.sigmoid().log() + (1 - x) * (-bias).sigmoid().log()).sum(-1)
    bounds = log_likelihood_bounds(*chains(recognition, generative, 3), x, 1000)
    assert_near(bounds.log_likelihood, exact)

    with torch.no_grad():  # at the optimum itself every importance weight is p(x)
        recognition.when_off.zero_()
        recognition.when_on.zero_()
    bounds = log_likelihood_bounds(*chains(recognition, generative, 3), x, 3)
    torch.testing.assert_close(bounds.elbo, exact)
    torch.testing.assert_close(bounds.log_likelihood, exact)


def test_2_and_3_one_pixel_that_leans_on_one_latent_variable():
    """Independent problems side by side, one in each dimension; the last slope makes x = 1[z > 0]."""
    slopes = torch.tensor([1.0, 2.0, 4.0, 8.0, 1e6], dtype=torch.float64)
    mean = torch.tensor([0.413242, 0.605706, 0.729478, 0.778403, 0.797885])
    variance = torch.tensor([0.829231, 0.633121, 0.467863, 0.394089, 0.363380])
    generative = Generative(lambda z: slopes * z)
    recognition = Recognition(latent=5)
    sleep(recognition, generative, latent=5)
    assert_near(recognition.when_on, torch.stack((mean, variance.log())))
    assert_near(recognition.when_off, torch.stack((-mean, variance.log())))


def test_4_sleep_covers_both_modes_where_the_elbo_takes_one():
    generative = Generative(lambda z: 6 * z.prod(-1, keepdim=True))
    recognition = Recognition(latent=2)
    sleep(recognition, generative, latent=2)
    assert_near(recognition.when_on, torch.zeros(2, 2))

    pixel_on, networks = PIXEL_OFF_AND_ON[1:], chains(recognition, generative, 2)
    bounds = log_likelihood_bounds(*networks, pixel_on, 100_000, chunk_samples=10_000)
    assert_near(bounds.elbo[0], -2.118842)
    assert_near(bounds.log_likelihood[0], -math.log(2))

    def negative_elbo(step):
        return elbo_loss(*networks, pixel_on, 4000, keys=[make_key(1, step)])

    with torch.no_grad():
        recognition.when_on.fill_(0.3)
    minimise(negative_elbo, recognition.parameters())
    assert_near(recognition.when_on[0].abs(), [0.543, 0.543])
    assert recognition.when_on[0].prod() > 0
    assert_near(recognition.when_on[1], [-0.9676, -0.9676])
    bounds = log_likelihood_bounds(*networks, pixel_on, 100_000, chunk_samples=10_000)
    assert_near(bounds.elbo[0], -1.353046)
