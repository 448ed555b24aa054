r"""Measure how good a trained model is, and where it fails.

One pass over samples from q, with weights :math:`w = p_\theta(x, z)/q_\phi(z|x)`, gives bounds on log p(x), the terms
of the ELBO and the effective sample size. The same pass estimates the KL divergence between q and the posterior in both
directions. For dreams, the z that generated x is known, which gives a better estimate of KL(p(z|x) || q(z|x)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from wakesleep_ext import ops, random
from wakesleep_ext.evaluation.annealing import AnnealedLogLikelihood, annealed_log_likelihood
from wakesleep_ext.evaluation.discrepancy import Discrepancy, energy_distance
from wakesleep_ext.evaluation.importance import ImportanceWeights, WeightedDraws, weighted_draws
from wakesleep_ext.helmholtz.models import PIXEL_MEAN_CLIP, GenerativeNetwork, HelmholtzMachine, RecognitionNetwork

ACTIVE = 0.01
"""Threshold of activity: a latent variable is active if its activity exceeds this value."""


@dataclass(frozen=True)
class Bounds:
    """Lower bounds on log p(x) and their terms, in nats, with one value per image: float64 `[N]`, on the CPU."""

    log_likelihood: Tensor
    """The K-sample bound: the log of the mean of w. Its expectation lies between the ELBO and log p(x)."""
    reconstruction: Tensor
    """Mean of log p(x|z_1) over the samples."""
    kl: Tensor
    """KL term of each stochastic layer, `[N, T]`: the mean of log q(z_t|z_{t-1}) - log p(z_t|z_{t+1}). For the topmost
    layer, this term is a KL divergence from the prior. For the other layers, it is a KL divergence only in expectation
    over z_{t+1}. Since z_{t+1} depends on z_t, the term may be negative."""
    forward_kl: Tensor
    """KL(p(z|x) || q(z|x)), estimated from importance-weighted samples. The estimate is at most log K, so large
    divergences are underestimated."""
    effective_sample_size: Tensor
    """Number of independent posterior samples that would be as informative as the K weighted samples."""

    @property
    def elbo(self) -> Tensor:
        """Mean over the K samples of log w = log p(x, z) - log q(z|x)."""
        return self.reconstruction - self.kl.sum(-1)

    @property
    def reverse_kl(self) -> Tensor:
        """KL(q(z|x) || p(z|x)): the gap between the ELBO and the log-likelihood."""
        return self.log_likelihood - self.elbo


@torch.no_grad()
def log_likelihood_bounds(
    recognition: RecognitionNetwork,
    generative: GenerativeNetwork,
    x: Tensor,
    num_samples: int,
    *,
    seed: int = 0,
    chunk_rows: int = 2000,
    on_images: Callable[[int], object] = lambda images: None,
) -> Bounds:
    r"""Return the ELBO and the importance-weighted bound (Burda, Grosse & Salakhutdinov 2016) of each image.

    .. math:: \log \frac1K\sum_k w_k, \qquad
        w_k = \frac{p_\theta(x \mid z_k)\, p(z_k)}{q_\phi(z_k \mid x)}, \quad z_k \sim q_\phi

    The same samples, with normalised weights :math:`\tilde w_k`, give


    .. math:: \mathrm{ESS} = \frac{1}{\sum_k \tilde w_k^2}, \qquad
        \mathrm{KL}(p(z|x) \,\|\, q) \approx \sum_k \tilde w_k \log w_k - \log \frac1K\sum_k w_k

    Images and samples are processed in chunks, and summed in float64. Memory use depends only on `chunk_rows`.

    Args:
        recognition: the network that the samples are drawn from.
        generative: the network to evaluate.
        x: binary pixels `[N, D]`, bool, uint8 or floating point, on the device of the networks.
        num_samples: K, samples per image.
        seed: the same seed and chunk size give the same samples on every device.
        chunk_rows: maximum number of samples in a chunk. A chunk contains all K samples of several images, or some
            samples of one image.
        on_images: called after each chunk with the number of images that it completed.

    Raises:
        ValueError: `num_samples` or `chunk_rows` is below 1.
    """
    for name, value in {"num_samples": num_samples, "chunk_rows": chunk_rows}.items():
        if value < 1:
            raise ValueError(f"log_likelihood_bounds: expected {name} >= 1, got {value}")
    found = []
    draw = recognition_draws(recognition, generative, seed, x.device)
    for images, chunks in weighted_draws(draw, x, num_samples, chunk_rows):
        weights = ImportanceWeights(len(images), x.device)
        total = torch.zeros(len(recognition) + 1, len(images), dtype=torch.float64, device=x.device)
        for chunk in chunks:
            total += chunk.terms.sum(1)
            weights.add(chunk.log_w)
        of_images = (total.t() / num_samples, weights.log_mean, weights.divergence, weights.effective_sample_size)
        found.append([value.cpu() for value in of_images])
        on_images(len(images))
    mean, log_likelihood, forward_kl, effective_sample_size = map(torch.cat, zip(*found, strict=True))
    return Bounds(log_likelihood, mean[:, 0], -mean[:, 1:], forward_kl, effective_sample_size)


def recognition_draws(
    recognition: RecognitionNetwork, generative: GenerativeNetwork, seed: int, device: torch.device
) -> Callable[[Tensor, int], WeightedDraws]:
    """Return the function that draws z from q, weighted by p(x, z) / q(z|x), for :func:`weighted_draws`.

    The terms of log w are log p(x|z_1), then log p(z_t|z_{t+1}) - log q(z_t|z_{t-1}) of each layer.

    Args:
        recognition: the network that the samples are drawn from.
        generative: the network to evaluate.
        seed: seed of the draws. Each call takes the next keys.
        device: device of the networks.
    """
    keys = (random.make_key(seed, number, device) for number in count())

    def draw(x: Tensor, num_samples: int) -> WeightedDraws:
        draws = recognition.rsample_log_prob(x, num_samples, keys=[next(keys) for _ in recognition])
        latents = [draw.z for draw in draws]
        of_x, *of_latents = [factor.log_prob() for factor in generative.factors(latents, x)]
        of_layers = [log_p - draw.log_q for log_p, draw in zip(of_latents, draws, strict=True)]
        return WeightedDraws(latents, torch.stack((of_x, *of_layers)).double())

    return draw


@torch.no_grad()
def activities(
    recognition: RecognitionNetwork, x: Tensor, num_samples: int = 20, *, seed: int = 0, chunk_rows: int = 2000
) -> list[Tensor]:
    r"""Measure how much latent variables depend on the image (Burda, Grosse & Salakhutdinov 2016).

    .. math:: A_u = \mathrm{Var}_x\big(\mathbb E_{q_\phi(u \mid x)}[u]\big)

    A variable u is active if :math:`A_u` exceeds 0.01 (:data:`ACTIVE`). For a Bernoulli variable, this means that the
    standard deviation of its probability over images exceeds 0.1. Above the first layer, the expectation is over draws
    of the layers below. The variance due to sampling noise is subtracted, so the estimate is unbiased. The estimate may
    be negative for an inactive variable.

    Args:
        recognition: the network to evaluate.
        x: binary pixels `[N, D]`, N >= 2.
        num_samples: draws per image, at least 2.
        seed: seed of the draws.
        chunk_rows: maximum number of samples in memory.

    Returns:
        The activities of each layer, starting with the layer next to x: float64 `[K]`, on the CPU.

    Raises:
        ValueError: there are fewer than two images or samples.
    """
    if len(x) < 2 or num_samples < 2:
        raise ValueError(f"activities: expected at least two images and two samples, got {len(x)} and {num_samples}")
    means: list[list[Tensor]] = [[] for _ in recognition]
    noises: list[list[Tensor]] = [[] for _ in recognition]
    for number, images in enumerate(x.split(max(1, chunk_rows // num_samples))):
        offset = number * len(recognition)
        keys = [random.make_key(seed, offset + layer, x.device) for layer in range(len(recognition))]
        for layer, draw in enumerate(recognition.rsample_log_prob(images, num_samples, keys=keys)):
            mean = draw.q.mean.double().expand_as(draw.z)
            means[layer].append(mean.mean(0))
            noises[layer].append(mean.var(0) / num_samples)
    return [
        (torch.cat(mean).var(0) - torch.cat(noise).mean(0)).cpu() for mean, noise in zip(means, noises, strict=True)
    ]


def independent_bernoulli_nll(pixel_mean: Tensor, x: Tensor) -> float:
    """Return the mean negative log-likelihood of images under independent pixels, in nats.

    Args:
        pixel_mean: `[D]`, the mean of each pixel over the training set. It is clipped to [0.001, 0.999], so that no
            test pixel has probability zero.
        x: binary test images `[N, D]`.
    """
    logits = torch.logit(pixel_mean.double(), eps=PIXEL_MEAN_CLIP)
    return -ops.bernoulli_log_prob(logits, x).mean().item()


@dataclass(frozen=True)
class Evaluation:
    """The results of :func:`evaluate`."""

    num_samples: int
    """K, the number of samples per image for the bounds."""
    wake: Bounds
    """Bounds for images, which are the input of the wake phase."""
    sleep: Bounds
    """Bounds for dreams, which are the input of the sleep phase."""
    sleep_forward_kl: Tensor
    r"""log p(x, z) - log q(z|x) - log p(x) for each dream and the z that generated it: float64 `[N]`. Its mean over
    dreams estimates the mean of KL(p(z|x) || q(z|x)), which the sleep phase minimises."""
    activities: list[Tensor]
    """Activities of the latent variables of each layer; see :func:`activities`."""
    discrepancy: Discrepancy
    """Discrepancy between dreams and images."""
    annealed: AnnealedLogLikelihood | None
    """Estimates by annealed importance sampling for the first `annealed_images` images; None if that number is 0."""

    @property
    def active_units(self) -> list[int]:
        """Number of active latent variables in each layer."""
        return [int((activity > ACTIVE).sum()) for activity in self.activities]

    def summary(self) -> dict[str, Any]:
        """Return a summary that can be saved as JSON: means over images, in nats, and counts."""
        summary: dict[str, Any] = {
            "nll": -self.wake.log_likelihood.mean().item(),
            "elbo": self.wake.elbo.mean().item(),
            "reconstruction": self.wake.reconstruction.mean().item(),
            "kl": self.wake.kl.mean(0).tolist(),
            "bound_samples": self.num_samples,
            "images": len(self.wake.log_likelihood),
            "effective_sample_size": self.wake.effective_sample_size.mean().item(),
            "active_units": self.active_units,
            "units": [len(activity) for activity in self.activities],
            "posterior_kl": {
                "wake": {
                    "reverse": self.wake.reverse_kl.mean().item(),
                    "forward": self.wake.forward_kl.mean().item(),
                },
                "sleep": {
                    "reverse": self.sleep.reverse_kl.mean().item(),
                    "forward": self.sleep_forward_kl.mean().item(),
                },
            },
            "dreams": len(self.sleep_forward_kl),
            "energy_distance": self.discrepancy.energy_distance,
            "energy_distance_p_value": self.discrepancy.p_value,
        }
        if self.annealed is not None:
            images = len(self.annealed.log_likelihood)
            summary["ais"] = {
                "nll": -self.annealed.mean,
                "standard_error": self.annealed.standard_error_of_mean,
                "acceptance": self.annealed.acceptance.mean().item(),
                "images": images,
                "bound_nll": -self.wake.log_likelihood[:images].mean().item(),
            }
        return summary


@torch.no_grad()
def evaluate(
    machine: HelmholtzMachine,
    x: Tensor,
    num_samples: int,
    num_dreams: int,
    *,
    annealed_images: int = 0,
    chains: int = 16,
    temperatures: int = 1000,
    seed: int = 0,
    progress: Callable[[str, int], Callable[[int], object]] = lambda part, images: lambda finished: None,
) -> Evaluation:
    """Run every evaluation of a Helmholtz machine.

    Args:
        machine: the model to evaluate.
        x: binary pixels `[N, D]`, N >= 2, on the device of the machine.
        num_samples: K, the number of samples per image for the bounds.
        num_dreams: number of dreams to draw, at least 2.
        annealed_images: the first `annealed_images` images are also evaluated by annealed importance sampling.
        chains, temperatures: as for :func:`wakesleep_ext.evaluation.annealing.annealed_log_likelihood`.
        seed: seed of all draws. The bounds on images equal those of :func:`log_likelihood_bounds` with this seed.
        progress: called before each part of the evaluation, with the name of the part and its number of images. It must
            return a function, which is then called with the number of images just completed.
    """
    recognition, generative = machine.recognition, machine.generative
    # separate seeds make the draws of each part independent of the draws that they are compared with
    seeds = random.philox_words(random.make_key(seed), 5).tolist()
    of_dreams, of_sleep, of_chains, of_activities, of_permutations = seeds
    keys = [random.make_key(of_dreams, draw, x.device) for draw in range(len(generative))]
    latents, dreams = generative.dream(num_dreams, keys=keys)

    name = f"NLL bound, K = {num_samples}"
    wake = log_likelihood_bounds(recognition, generative, x, num_samples, seed=seed, on_images=progress(name, len(x)))
    sleep = log_likelihood_bounds(
        recognition,
        generative,
        dreams,
        num_samples,
        seed=of_sleep,
        on_images=progress("NLL bound of dreams", num_dreams),
    )
    log_w = generative.log_prob(latents, dreams).double() - recognition.log_prob(latents, dreams).double()
    annealed = None
    if annealed_images:
        chosen = x[:annealed_images]
        annealed = annealed_log_likelihood(
            generative,
            chosen,
            chains,
            temperatures,
            seed=of_chains,
            on_images=progress("Annealed importance sampling", len(chosen)),
        )
    return Evaluation(
        num_samples,
        wake,
        sleep,
        log_w.cpu() - sleep.log_likelihood,
        activities(recognition, x, seed=of_activities),
        energy_distance(dreams, x, seed=of_permutations),
        annealed,
    )
