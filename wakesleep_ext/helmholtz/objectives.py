r"""Compute the training objectives. Each is a pure function from the networks and a batch to a loss.

With L samples :math:`z_l \sim q_\phi(z|x)` for each image, :math:`w_l = p_\theta(x, z_l)/q_\phi(z_l|x)` and
:math:`\tilde w_l = w_l / \sum_k w_k`:

- wake-sleep (Hinton, Dayan, Frey & Neal, "The wake-sleep algorithm for unsupervised neural networks", Science 268,
  1995): :func:`wake_theta_loss` and :func:`sleep_phi_loss`. Each phase trains one network on samples from the other.
  The samples carry no gradient, so each loss trains only one network.
- reweighted wake-sleep (Bornschein & Bengio, "Reweighted wake-sleep", ICLR 2015): :func:`reweighted_wake_losses`. Its
  loss for phi may be combined with the sleep-phase loss.
- the baselines, which differentiate through the draws: :func:`elbo_loss` (Kingma & Welling, "Auto-encoding variational
  Bayes", 2014), :func:`iwae_loss` (Burda, Grosse & Salakhutdinov, "Importance weighted autoencoders", ICLR 2016) and
  :func:`dreg_loss` (Tucker, Lawson, Gu & Maddison, "Doubly reparameterized gradient estimators for Monte Carlo
  objectives", ICLR 2019).

Every loss is a 0-dimensional tensor: the mean over images (or dreams), in nats. The networks may have several
stochastic layers; log q(z|x) and log p(x, z) are then sums over the layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from wakesleep_ext import ops
from wakesleep_ext.densities import Distribution
from wakesleep_ext.helmholtz.models import Factor, GenerativeNetwork, Keys, RecognitionNetwork


class WakeLosses(NamedTuple):
    """The losses of a wake phase."""

    theta: Tensor
    """Loss of the generative network. If `phi` is None and the objective differentiates through the draws, this loss
    trains both networks."""
    phi: Tensor | None = None
    """Loss of the recognition network."""


def wake_theta_loss(
    recognition: RecognitionNetwork,
    generative: GenerativeNetwork,
    x: Tensor,
    num_samples: int = 1,
    *,
    keys: Keys = None,
) -> Tensor:
    r"""Return the wake-phase loss: minus the expected joint log-probability of the images and their inferred latents.

    .. math:: -\frac1B\sum_b \frac1L\sum_l \log p_\theta(x_b, z_{bl}),
        \qquad z_{bl} \sim q_\phi(z \mid x_b)

    A prior N(0, I) has no parameters, so its log-density is omitted. With a single layer, only
    :math:`\log p_\theta(x|z)` remains. L = 1 is the wake phase of Hinton et al. (1995); more samples reduce the noise.

    Args:
        recognition: the network that infers the latents; it receives no gradient.
        generative: the network to train.
        x: binary pixels `[B, D]`: bool, uint8 or floating point.
        num_samples: L.
        keys: random keys, one per stochastic layer (see `wakesleep_ext.random.draw_key`). The default draws new keys.
    """
    with torch.no_grad():
        latents = recognition.rsample(x, num_samples, keys=keys)
    return _minus_mean_log_prob(generative.factors(latents, x), latents[-1])


def sleep_phi_loss(
    recognition: RecognitionNetwork,
    generative: GenerativeNetwork,
    num_dreams: int,
    *,
    keys: Keys = None,
) -> Tensor:
    r"""Return the sleep-phase loss: minus the expected log-probability of the latents that generated the dreams.

    .. math:: -\frac1N\sum_n \log q_\phi(z_n \mid x_n),
        \qquad z_n \sim p(z),\; x_n \sim p_\theta(x \mid z_n)

    Minimising this loss over phi minimises the mean of KL(p(z|x) || q(z|x)) over dreams (Hinton et al. 1995). The ELBO
    uses the KL divergence in the opposite direction.

    Args:
        recognition: the network to train.
        generative: the network that generates the dreams; it receives no gradient.
        num_dreams: N.
        keys: random keys, one per stochastic layer from z_T down, then one for x. The default draws new keys.
    """
    latents, x = generative.dream(num_dreams, keys=keys)
    return _minus_mean_log_prob(recognition.factors(latents, x), latents[-1])


def reweighted_wake_losses(
    recognition: RecognitionNetwork,
    generative: GenerativeNetwork,
    x: Tensor,
    num_samples: int,
    *,
    defensive_fraction: float = 0.0,
    keys: Keys = None,
) -> WakeLosses:
    r"""Return the reweighted wake-phase losses of both networks. Importance weights are normalised per image.

    .. math:: \mathcal L_\theta = -\frac1B\sum_b \log\frac1L\sum_l w_{bl}, \qquad
        \mathcal L_\phi = -\frac1B\sum_b\sum_l \tilde w_{bl} \log q_\phi(z_{bl} \mid x_b)

    The gradient of :math:`\mathcal L_\theta` for one image is
    :math:`-\sum_l \tilde w_l \nabla_\theta \log p_\theta(x, z_l)`. Both losses treat the samples z as constants. In
    addition, :math:`\mathcal L_\theta` treats q as a constant, and :math:`\mathcal L_\phi` treats the weights as
    constants. If q were not constant in :math:`\mathcal L_\theta`, the two losses' gradients for phi would cancel
    exactly. The recognition network would then not learn. Since each loss trains only its own network, you can
    differentiate the sum of both losses.

    Args:
        recognition, generative, x, num_samples: as for :func:`wake_theta_loss`.
        defensive_fraction: probability, in [0, 1), that a sample is drawn from p(z) instead of q(z|x). Weights are then
            computed for the mixture of both. They are bounded wherever the likelihood is bounded (Hesterberg, "Weighted
            average importance sampling and defensive mixture distributions", 1995).
        keys: random keys, one per stochastic layer. A defensive mixture needs more keys: one to choose between q and p,
            then one per stochastic layer of p from z_T down.
    """
    if defensive_fraction:
        latents, log_q, log_proposal = _draw_defensively(
            recognition, generative, x, num_samples, defensive_fraction, keys
        )
    else:
        draws = recognition.rsample_log_prob(x, num_samples, keys=keys, detach=True)
        latents, log_q = [draw.z for draw in draws], _sum([draw.log_q for draw in draws])
        log_proposal = log_q.detach()
    log_w = generative.log_prob(latents, x) - log_proposal
    return WakeLosses(_minus_bound(log_w), -(_normalised(log_w) * log_q).sum(0).mean())


def elbo_loss(
    recognition: RecognitionNetwork,
    generative: GenerativeNetwork,
    x: Tensor,
    num_samples: int = 1,
    *,
    keys: Keys = None,
) -> Tensor:
    r"""Return the negative ELBO. Its gradient trains both networks, and passes through the draws.

    .. math:: -\frac1B\sum_b \frac1L\sum_l \log w_{bl}

    The KL divergence of the topmost layer from a prior N(0, I) is computed exactly. The KL terms of other layers are
    estimated from the draws.

    Args:
        recognition, generative, x, num_samples, keys: as for :func:`wake_theta_loss`. The latents must be Gaussian.
    """
    require_rsample(recognition)
    draws = recognition.rsample_log_prob(x, num_samples, keys=keys)
    *factors, topmost = generative.factors([draw.z for draw in draws], x)
    (*below, top), prior = draws, topmost.distribution
    kl = prior.kl_from(top.q)
    if kl is None:
        kl = top.log_q - prior.log_prob(top.z)
    return _sum([_minus_mean_log_prob(factors, top.z), kl.mean(), *(draw.log_q.mean() for draw in below)])


def iwae_loss(
    recognition: RecognitionNetwork,
    generative: GenerativeNetwork,
    x: Tensor,
    num_samples: int,
    *,
    keys: Keys = None,
) -> Tensor:
    r"""Return the negative L-sample bound. Its gradient trains both networks, and passes through the draws.

    .. math:: -\frac1B\sum_b \log\frac1L\sum_l w_{bl}

    Args:
        recognition, generative, x, num_samples, keys: as for :func:`wake_theta_loss`. The latents must be Gaussian.
    """
    require_rsample(recognition)
    draws = recognition.rsample_log_prob(x, num_samples, keys=keys)
    return _minus_bound(generative.log_prob([draw.z for draw in draws], x) - _sum([draw.log_q for draw in draws]))


def dreg_loss(
    recognition: RecognitionNetwork,
    generative: GenerativeNetwork,
    x: Tensor,
    num_samples: int,
    *,
    keys: Keys = None,
) -> Tensor:
    r"""Return the negative L-sample bound with a doubly reparameterised gradient.

    The gradient for theta is the same as in :func:`iwae_loss`. The gradient for phi is

    .. math:: -\frac1B\sum_b \sum_l \tilde w_{bl}^2 \frac{\partial \log w_{bl}}{\partial z_{bl}}
        \frac{\partial z_{bl}}{\partial \phi}

    This gradient has the same expectation as the gradient for phi of :func:`iwae_loss`, but its signal-to-noise ratio
    does not fall as L grows.

    Args:
        recognition, generative, x, num_samples, keys: as for :func:`wake_theta_loss`. The latents must be Gaussian.
    """
    require_rsample(recognition)
    # The hooks below are registered on views of z. There they receive only the gradient through the densities, not the
    # gradient through the draws of later layers.
    latents = [z.view_as(z) for z in recognition.rsample(x, num_samples, keys=keys)]
    fixed_q = [_detached(factor) for factor in recognition.factors(latents, x)]
    log_q = _sum([q.log_prob(z) for q, z in zip(fixed_q, latents, strict=True)])
    log_w = generative.log_prob(latents, x) - log_q
    weights = _normalised(log_w)
    for z in latents:
        if z.requires_grad:
            z.register_hook(lambda gradient: gradient * weights.unsqueeze(-1).to(gradient.dtype))
    return _minus_bound(log_w)


def _draw_defensively(
    recognition: RecognitionNetwork,
    generative: GenerativeNetwork,
    x: Tensor,
    num_samples: int,
    share: float,
    keys: Keys,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Sample from (1 - share) q(z|x) + share p(z); return the samples, log q, and the log-density of the mixture."""
    layers = len(recognition)
    keys = [None] * (2 * layers + 1) if keys is None else keys
    with torch.no_grad():
        recognised = recognition.rsample(x, num_samples, keys=keys[:layers])
        imagined = generative.sample_latents((num_samples, *x.shape[:-1]), keys=keys[layers + 1 :])
        odds = torch.full(x.shape[:-1], math.log(share / (1 - share)), dtype=torch.float32, device=x.device)
        chosen = ops.bernoulli_sample(odds, (num_samples,), dtype=torch.bool, key=keys[layers]).unsqueeze(-1)
        latents = [torch.where(chosen, *pair) for pair in zip(imagined, recognised, strict=True)]
        _, *of_latents = generative.factors(latents, x)
        log_prior = _sum([factor.log_prob() for factor in of_latents])
    log_q = recognition.log_prob(latents, x)
    log_proposal = torch.logaddexp(log_q.detach() + math.log(1 - share), log_prior + math.log(share))
    return latents, log_q, log_proposal


def _minus_mean_log_prob(factors: Iterable[Factor], like: Tensor) -> Tensor:
    """Return minus the sum of the trainable factors' log-probabilities, averaged over draws.

    The number of draws is the product of the leading sizes of `like`, `[*S, *B, K]`.
    """
    rows = math.prod(like.shape[:-1])
    scale = -1 / rows if rows else math.nan  # the ops scale gradients as they compute them
    scored = ((factor.distribution, factor.value) for factor in factors)
    return _sum([p.log_prob_sum(value, scale=scale) for p, value in scored if not p.is_fixed])


def _detached(factor: Factor) -> Distribution:
    """Return the factor's distribution with detached parameters, so that gradients reach only `factor.given`."""
    parameters = {name: parameter.detach() for name, parameter in factor.conditional.named_parameters()}
    distribution: Distribution = functional_call(factor.conditional, parameters, (factor.given,))
    return distribution


def require_rsample(recognition: RecognitionNetwork) -> None:
    """Check that the draws of the recognition network are differentiable.

    Raises:
        ValueError: the draws of a layer are not differentiable.
    """
    for conditional in recognition:
        if not conditional.has_rsample:
            raise ValueError(
                f"expected recognition to have differentiable draws, got {type(conditional).__name__}: "
                "its latent variables are discrete; train it by wake-sleep or reweighted wake-sleep"
            )


def _sum(terms: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, terms)


def _minus_bound(log_w: Tensor) -> Tensor:
    """Return minus the mean L-sample bound, given log weights `[L, B]`."""
    return math.log(len(log_w)) - log_w.logsumexp(0).mean()


def _normalised(log_w: Tensor) -> Tensor:
    """Return detached importance weights `[L, B]`, normalised to sum to 1 over the samples of each image."""
    return log_w.detach().softmax(0)
