"""Draw the pictures of a training run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from wakesleep_ext import random
from wakesleep_ext.evaluation.bounds import Evaluation
from wakesleep_ext.helmholtz.models import GenerativeNetwork, HelmholtzMachine, RecognitionNetwork
from wakesleep_ext.report import plots

_DREAMS, _RECONSTRUCTIONS = 100, 40


def draw_dreams(path: Path, machine: HelmholtzMachine, shape: tuple[int, int], count: int, seed: int = 0) -> None:
    """Sample latent variables from the prior, and write a picture of the pixel means that they generate."""
    with torch.no_grad():
        latents, _ = machine.dream(count, keys=_keys(machine.generative, seed))
        means = machine.generative.pixel_means(latents[0])
    plots.samples(path, means, shape)


def draw_run(
    path_of: Callable[[str], Path],
    machine: HelmholtzMachine,
    test: Tensor,
    shape: tuple[int, int],
    epochs: Sequence[dict[str, float]],
    evaluation: Evaluation,
    baseline_nll: float,
) -> None:
    """Draw dreams, reconstructions of test images, the learning curves and the evaluation.

    Args:
        path_of: maps the name of a picture to the path of its file.
        test: test images, binary pixels `[N, D]`.
        epochs: the metrics of each epoch.
        baseline_nll: test NLL of independent Bernoulli pixels.
    """
    draw_dreams(path_of("samples"), machine, shape, _DREAMS)
    shown = test[:_RECONSTRUCTIONS]
    reconstructed = machine.reconstruct(shown, keys=_keys(machine.recognition, 0))
    plots.reconstructions(path_of("reconstructions"), shown, reconstructed, shape)
    plots.curves(path_of("curves"), epochs, baseline_nll)
    plots.evaluation(path_of("evaluation"), evaluation)


def _keys(network: RecognitionNetwork | GenerativeNetwork, seed: int) -> list[Tensor]:
    """Return a random key for each factor of the network."""
    where = next(network.parameters()).device
    return [random.make_key(seed, draw, where) for draw in range(len(network))]
