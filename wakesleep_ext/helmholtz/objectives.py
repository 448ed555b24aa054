r"""Compute the training objectives. Each is a pure function from the networks and a batch to a loss.

With L samples :math:`z_l \sim q_\phi(z|x)` for each image, :math:`w_l = p_\theta(x, z_l)/q_\phi(z_l|x)` and
:math:`\tilde w_l = w_l / \sum_k w_k`:

- wake-sleep (Hinton, Dayan, Frey & Neal, "The wake-sleep algorithm for unsupervised neural networks", Science 268,
  1995): :func:`wake_theta_loss` and :func:`sleep_phi_loss`. Each phase trains one network on samples from the other.
  The samples carry no gradient, so each loss trains only one network.
- reweighted wake-sleep (Bornschein & Bengio, "Reweighted wake-sleep", ICLR 2015): :func:`reweighted_wake_losses`. Its
  gradient for phi may be combined with that of the sleep-phase loss.
- the baselines that differentiate through the draws: :func:`elbo_loss` (Kingma & Welling, "Auto-encoding variational
  Bayes", 2014), :func:`iwae_loss` (Burda, Grosse & Salakhutdinov, "Importance weighted autoencoders", ICLR 2016) and
  :func:`dreg_loss` (Tucker, Lawson, Gu & Maddison, "Doubly reparameterized gradient estimators for Monte Carlo
  objectives", ICLR 2019).
- the baseline for discrete latents: :func:`vimco_loss` (Mnih & Rezende, "Variational inference for Monte Carlo
  objectives", ICML 2016).

Every loss is a 0-dimensional tensor: the mean over images (or dreams), in nats. The networks may have several
stochastic layers; log q(z|x) and log p(x, z) are then sums over the layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import NamedTuple, get_args

import torch
from torch import Tensor
from torch.func import functional_call

from wakesleep_ext import ops
from wakesleep_ext.densities import Distribution
from wakesleep_ext.helmholtz.config import PATHWISE, PhiGradient
from wakesleep_ext.helmholtz.models import Factor, GenerativeNetwork, HelmholtzMachine, Keys, RecognitionNetwork


class WakeLosses(NamedTuple):
    """The losses of a wake phase."""

    theta: Tensor
    """Loss of the generative network. If `phi` is None, and the objective also trains the recognition network, this
    loss trains both networks."""
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
    phi_gradient: PhiGradient = "score",
    defensive_fraction: float = 0.0,
    keys: Keys = None,
) -> WakeLosses:
    r"""Return the losses of the reweighted wake phase. Importance weights are normalised per image.

    The loss of the generative network is minus the L-sample bound,

    .. math:: \mathcal L_\theta = -\frac1B\sum_b \log\frac1L\sum_l w_{bl},

    with the gradient :math:`-\sum_l \tilde w_l \nabla_\theta \log p_\theta(x, z_l)` for one image. The recognition
    network descends KL(p(z|x) || q(z|x)). `phi_gradient` selects the estimate of this gradient, for one image:

    - "score": :math:`-\sum_l \tilde w_l \nabla_\phi \log q(z_l|x)` (Bornschein & Bengio 2015);
    - "score-cv": :math:`-\sum_l (\tilde w_l - \frac1L) \nabla_\phi \log q(z_l|x)`. The control variate 1/L leaves the
      expectation unchanged, since the score has expectation 0 under q. It reduces the noise if weights are similar;
    - "dreg": :math:`-\sum_l (\tilde w_l - \tilde w_l^2) \frac{\partial \log w_l}{\partial z_l} \frac{\partial
      z_l}{\partial \phi}`, doubly reparameterised, with the same expectation (Tucker et al. 2019, RWS-DReG). It has no
      noise where q is the posterior;
    - "stl": :math:`-\sum_l \tilde w_l \frac{\partial \log w_l}{\partial z_l} \frac{\partial z_l}{\partial \phi}`
      ("sticking the landing": Roeder, Wu & Duvenaud, NeurIPS 2017). It is the sum of "dreg" and the gradient of
      :func:`dreg_loss`, so it descends the divergence plus :math:`\mathcal L_\theta`.

    "score" and "score-cv" accept any latent variables, and treat z as constants. They return two losses, each of which
    trains only its own network, so you can differentiate the sum. The value of `phi` is :math:`-\sum_l \tilde w_l \log
    q(z_l|x)`, averaged over images. "dreg" and "stl" need differentiable draws. They return a single loss, `theta`,
    that trains both networks; `phi` is None.

    Args:
        recognition, generative, x, num_samples: as for :func:`wake_theta_loss`. "score-cv" and "dreg" need L of at
            least 2, since they are zero for L = 1.
        phi_gradient: the estimate of the recognition network's gradient.
        defensive_fraction: probability, in [0, 1), that a sample is drawn from p(z) instead of q(z|x). Weights are then
            computed for the mixture of both. They are bounded wherever the likelihood is bounded (Hesterberg, "Weighted
            average importance sampling and defensive mixture distributions", 1995). Only "score" supports it.
        keys: random keys, one per stochastic layer. A defensive mixture needs more keys: one to choose between q and p,
            then one per stochastic layer of p from z_T down.

    Raises:
        ValueError: `phi_gradient` does not support the number of samples, the defensive fraction or the latents.
    """
    require_phi_gradient(phi_gradient, recognition, num_samples, defensive_fraction)
    if phi_gradient in PATHWISE:
        rescale = (lambda weights: 1 - weights) if phi_gradient == "dreg" else None
        return WakeLosses(_pathwise_loss(recognition, generative, x, num_samples, rescale, keys))
    if defensive_fraction:
        latents, log_q, log_proposal = _draw_defensively(
            recognition, generative, x, num_samples, defensive_fraction, keys
        )
    else:
        latents, log_q = _draw_fixed(recognition, x, num_samples, keys)
        log_proposal = log_q.detach()
    # If q were not constant in the weights, both losses' gradients for phi would cancel exactly.
    log_w = generative.log_prob(latents, x) - log_proposal
    phi = -(_normalised(log_w) * log_q).sum(0).mean()
    if phi_gradient == "score-cv":
        phi = phi + _gradient_only(log_q).mean()
    return WakeLosses(_minus_bound(log_w), phi)


def vimco_loss(
    recognition: RecognitionNetwork,
    generative: GenerativeNetwork,
    x: Tensor,
    num_samples: int,
    *,
    keys: Keys = None,
) -> Tensor:
    r"""Return the negative L-sample bound with a gradient that does not pass through the draws.

    The value and the gradient for theta are those of :func:`iwae_loss`. The gradient for phi of one image is

    .. math:: -\sum_l \left(\hat{\mathcal L} - \hat{\mathcal L}_{-l} - \tilde w_l\right) \nabla_\phi \log q(z_l|x),
        \qquad \hat{\mathcal L}_{-l} = \log\frac1L\Big(\sum_{j \ne l} w_j + \prod_{j \ne l} w_j^{1/(L-1)}\Big)

    where :math:`\hat{\mathcal L}` is the bound. The expectation is that of :func:`iwae_loss`. Source: Mnih & Rezende,
    "Variational inference for Monte Carlo objectives", ICML 2016.

    Args:
        recognition, generative, x, keys: as for :func:`wake_theta_loss`, with any latent variables.
        num_samples: L, at least 2.
    """
    require_several(num_samples, "vimco_loss")
    latents, log_q = _draw_fixed(recognition, x, num_samples, keys)
    log_w = generative.log_prob(latents, x) - log_q
    fixed = log_w.detach()
    mean_of_others = (fixed.sum(0) - fixed) / (num_samples - 1)
    replaced = torch.where(_diagonal(fixed), mean_of_others, fixed.unsqueeze(1))  # [L, L, B]: w_j without the l-th
    signal = fixed.logsumexp(0) - replaced.logsumexp(0)
    return _minus_bound(log_w) - (signal * _gradient_only(log_q)).sum(0).mean()


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
    return _pathwise_loss(recognition, generative, x, num_samples, lambda weights: weights, keys)


def _pathwise_loss(
    recognition: RecognitionNetwork,
    generative: GenerativeNetwork,
    x: Tensor,
    num_samples: int,
    rescale: Callable[[Tensor], Tensor] | None,
    keys: Keys,
) -> Tensor:
    r"""Return the negative L-sample bound, with log q differentiated only through the draws.

    The gradient for phi of one image is :math:`-\sum_l \tilde w_l r(\tilde w_l) \frac{\partial \log w_l}{\partial
    z_l} \frac{\partial z_l}{\partial \phi}`, where r is `rescale`, or 1.
    """
    require_rsample(recognition)
    # The hooks below are registered on views of z. There they receive only the gradient through the densities, not the
    # gradient through the draws of later layers.
    latents = [z.view_as(z) for z in recognition.rsample(x, num_samples, keys=keys)]
    fixed_q = [_detached(factor) for factor in recognition.factors(latents, x)]
    log_q = _sum([q.log_prob(z) for q, z in zip(fixed_q, latents, strict=True)])
    log_w = generative.log_prob(latents, x) - log_q
    if rescale is not None:
        scale = rescale(_normalised(log_w)).unsqueeze(-1)
        for z in latents:
            if z.requires_grad:
                z.register_hook(lambda gradient: gradient * scale.to(gradient.dtype))
    return _minus_bound(log_w)


def _draw_fixed(
    recognition: RecognitionNetwork, x: Tensor, num_samples: int, keys: Keys
) -> tuple[list[Tensor], Tensor]:
    """Sample from q(z|x) without gradient; return the samples and log q, which is differentiable at fixed samples."""
    draws = recognition.rsample_log_prob(x, num_samples, keys=keys, detach=True)
    return [draw.z for draw in draws], _sum([draw.log_q for draw in draws])


def named(
    objective: str,
    machine: HelmholtzMachine,
    num_samples: int,
    phi_gradient: PhiGradient | None = None,
    defensive_fraction: float = 0.0,
) -> Callable[[Tensor, Keys], WakeLosses]:
    """Return a function that maps images and keys to the losses of the wake phase.

    Args:
        objective: "wake-sleep", "reweighted-wake-sleep", "elbo", "iwae", "dreg" or "vimco".
        machine: the networks to train.
        num_samples: L, samples per image.
        phi_gradient, defensive_fraction: as for :func:`reweighted_wake_losses`, for that objective only.

    Raises:
        ValueError: the machine or the number of samples does not suit the objective.
    """
    recognition, generative = machine.recognition, machine.generative
    if objective == "reweighted-wake-sleep":
        gradient = phi_gradient or "score"
        require_phi_gradient(gradient, recognition, num_samples, defensive_fraction)
        return lambda x, keys: reweighted_wake_losses(
            recognition,
            generative,
            x,
            num_samples,
            phi_gradient=gradient,
            defensive_fraction=defensive_fraction,
            keys=keys,
        )
    loss = {
        "wake-sleep": wake_theta_loss,
        "elbo": elbo_loss,
        "iwae": iwae_loss,
        "dreg": dreg_loss,
        "vimco": vimco_loss,
    }[objective]
    if objective == "vimco":
        require_several(num_samples, "objective 'vimco'")
    elif objective != "wake-sleep":
        require_rsample(recognition)
    return lambda x, keys: WakeLosses(loss(recognition, generative, x, num_samples, keys=keys))


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
        odds = torch.full((*x.shape[:-1], 1), math.log(share / (1 - share)), dtype=torch.float32, device=x.device)
        chosen = ops.bernoulli_sample(odds, (num_samples,), dtype=torch.bool, key=keys[layers])
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


def require_phi_gradient(
    phi_gradient: PhiGradient, recognition: RecognitionNetwork, num_samples: int, defensive_fraction: float = 0.0
) -> None:
    """Check that :func:`reweighted_wake_losses` accepts these arguments together.

    Raises:
        ValueError: `phi_gradient` does not support the latents, the number of samples or the defensive fraction.
    """
    if phi_gradient not in get_args(PhiGradient):
        raise ValueError(f"expected phi_gradient to be one of {get_args(PhiGradient)}, got {phi_gradient!r}")
    if phi_gradient in PATHWISE:
        require_rsample(recognition)
    if phi_gradient in ("score-cv", "dreg"):
        require_several(num_samples, f"phi_gradient {phi_gradient!r}")
    if defensive_fraction and phi_gradient != "score":
        raise ValueError(
            f"expected phi_gradient 'score' with defensive_fraction {defensive_fraction:g}, got {phi_gradient!r}"
        )


def require_several(num_samples: int, what: str) -> None:
    """Check that there are at least two samples.

    Raises:
        ValueError: there are fewer; the message names what needs them.
    """
    if num_samples < 2:
        raise ValueError(
            f"expected num_samples of at least 2 with {what}, got {num_samples}: the recognition network would not "
            "learn"
        )


def _gradient_only(value: Tensor) -> Tensor:
    """Return zeros with the gradient of `value`."""
    return value - value.detach()


def _diagonal(log_w: Tensor) -> Tensor:
    """Return a mask `[L, L, 1]` that is true on the diagonal, given `[L, B]`."""
    return torch.eye(len(log_w), dtype=torch.bool, device=log_w.device).unsqueeze(-1)


def _sum(terms: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, terms)


def _minus_bound(log_w: Tensor) -> Tensor:
    """Return minus the mean L-sample bound, given log weights `[L, B]`."""
    return math.log(len(log_w)) - log_w.logsumexp(0).mean()


def _normalised(log_w: Tensor) -> Tensor:
    """Return detached importance weights `[L, B]`, normalised to sum to 1 over the samples of each image."""
    return log_w.detach().softmax(0)
