"""How good a trained machine is: bounds on log p(x), and the baseline that any model must beat."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wakesleep_ext import ops, random
from wakesleep_ext.models import PIXEL_MEAN_CLIP, GenerativeNetwork, RecognitionNetwork


@dataclass(frozen=True)
class Bounds:
    """Lower bounds on log p(x) in nats, one per image: float64 `[N]`, on the CPU."""

    elbo: Tensor
    """Mean over the K samples of log w = log p(x, z) - log q(z|x)."""
    log_likelihood: Tensor
    """The K-sample bound, log of the mean of w: between the ELBO and log p(x) in expectation."""


@torch.no_grad()
def log_likelihood_bounds(
    recognition: RecognitionNetwork,
    generative: GenerativeNetwork,
    x: Tensor,
    num_samples: int,
    *,
    seed: int = 0,
    chunk_images: int = 100,
    chunk_samples: int = 20,
    on_images: Callable[[int], object] = lambda images: None,
) -> Bounds:
    r"""ELBO and importance-weighted bound (Burda, Grosse & Salakhutdinov 2016) of each image.

    .. math:: \log \frac1K\sum_k w_k, \qquad
        w_k = \frac{p_\theta(x \mid z_k)\, p(z_k)}{q_\phi(z_k \mid x)}, \quad z_k \sim q_\phi

    Images and samples are taken in chunks, whose log-sum-exps are accumulated in float64: memory
    depends on the chunk sizes alone.

    Args:
        recognition: what the samples are drawn from.
        generative: what is to be judged.
        x: binary pixels `[N, D]`, bool, uint8 or floating, on the device of the networks.
        num_samples: samples per image.
        seed: the same seed and chunk sizes give the same samples on every device.
        chunk_images: images in a chunk.
        chunk_samples: samples per image in a chunk.
        on_images: called with the number of images that have just been finished.
    """
    for name, value in {
        "num_samples": num_samples,
        "chunk_images": chunk_images,
        "chunk_samples": chunk_samples,
    }.items():
        if value < 1:
            raise ValueError(f"log_likelihood_bounds: expected {name} >= 1, got {value}")
    elbos, bounds = [], []
    number = 0
    for images in x.split(chunk_images):
        total = torch.zeros(len(images), dtype=torch.float64, device=x.device)
        log_total = torch.full_like(total, -math.inf)
        for first in range(0, num_samples, chunk_samples):
            samples = min(chunk_samples, num_samples - first)
            keys = [random.make_key(seed, number + layer, x.device) for layer in range(len(recognition))]
            number += len(recognition)
            draws = recognition.sample_log_prob(images, samples, keys=keys)
            log_w = generative.log_prob([draw.z for draw in draws], images)
            for draw in draws:
                log_w = log_w - draw.log_q
            log_w = log_w.double()
            total += log_w.sum(0)
            log_total = torch.logaddexp(log_total, log_w.logsumexp(0))
        elbos.append(total / num_samples)
        bounds.append(log_total - math.log(num_samples))
        on_images(len(images))
    return Bounds(torch.cat(elbos).cpu(), torch.cat(bounds).cpu())


def independent_bernoulli_nll(pixel_mean: Tensor, x: Tensor) -> float:
    """Mean negative log-likelihood of images whose pixels are independent, in nats.

    Args:
        pixel_mean: `[D]`, the training set's mean of each pixel; clipped to [0.001, 0.999], so
            that no test pixel is impossible.
        x: binary test images `[N, D]`.
    """
    logits = torch.logit(pixel_mean.double(), eps=PIXEL_MEAN_CLIP)
    return -ops.bernoulli_log_prob(logits, x).mean().item()
