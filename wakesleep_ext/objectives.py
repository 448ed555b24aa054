"""The two objectives of wake-sleep, pure functions from the networks and a batch to a loss.

Each phase trains one network on what the other has drawn (Hinton, Dayan, Frey & Neal, "The
wake-sleep algorithm for unsupervised neural networks", Science 268, 1995): the drawing is done
without gradients, so a loss reaches one network's parameters only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from wakesleep_ext import ops
from wakesleep_ext.models import dream, log_likelihood_sum


def wake_theta_loss(
    recognition: nn.Module,
    generative: nn.Module,
    x: Tensor,
    num_samples: int = 1,
    *,
    key: Tensor | None = None,
) -> Tensor:
    r"""Wake phase: explain the data, given what recognition makes of them.

    .. math:: -\frac1B\sum_b \frac1L\sum_l \log p_\theta(x_b \mid z_{bl}),
        \qquad z_{bl} \sim q_\phi(z \mid x_b)

    With z drawn from q, log p(z) does not depend on theta and is left out. L = 1 is the wake phase
    of Hinton et al. (1995); more samples average its noise, weighted evenly (Bornschein & Bengio,
    "Reweighted wake-sleep", ICLR 2015, weights them by importance instead).

    Args:
        recognition: maps x `[B, D]` to `[mu | logvar]` `[B, 2K]`; gets no gradient.
        generative: maps z `[L, B, K]` to logits `[L, B, D]`.
        x: binary pixels `[B, D]`: bool, uint8 or floating.
        num_samples: L.
        key: the key that z is drawn with (`wakesleep_ext.random.draw_key`), drawn if not given.

    Returns:
        The loss in nats per image, 0-dimensional.
    """
    with torch.no_grad():
        mu, logvar = ops.gaussian_parameters(recognition(x))
        z = ops.gaussian_rsample(mu, logvar, (num_samples,), key=key)
    # a weight of the rows rather than a factor of their sum: the gradients are scaled as they are formed
    wide = torch.promote_types(z.dtype, torch.float32)
    weight = torch.full((), _minus_mean(math.prod(z.shape[:-1])), dtype=wide, device=z.device)
    return log_likelihood_sum(generative, z, x, weight)


def sleep_phi_loss(
    recognition: nn.Module,
    generative: nn.Module,
    num_dreams: int,
    latent: int,
    *,
    keys: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    r"""Sleep phase: recognise the causes of dreams, which are known.

    .. math:: -\frac1N\sum_n \log q_\phi(z_n \mid x_n),
        \qquad z_n \sim p(z),\; x_n \sim p_\theta(x \mid z_n)

    Its minimum over phi is that of the mean over dreams of KL(p(z|x) || q(z|x)), the opposite
    direction to the ELBO's (Hinton et al. 1995).

    Args:
        recognition: maps x `[N, D]` to `[mu | logvar]` `[N, 2K]`.
        generative: maps z `[N, K]` to logits `[N, D]`; gets no gradient.
        num_dreams: N.
        latent: K.
        keys: the keys that z and x are drawn with, one each, drawn if not given.

    Returns:
        The loss in nats per dream, 0-dimensional.
    """
    z, x = dream(generative, num_dreams, latent, keys=keys)
    mu, logvar = ops.gaussian_parameters(recognition(x))
    return ops.gaussian_log_prob(mu, logvar, z).sum() * _minus_mean(num_dreams)


def _minus_mean(rows: int) -> float:
    """What a sum over rows is multiplied by, in one operation."""
    return -1 / rows if rows else math.nan
