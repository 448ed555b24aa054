"""Train posterior estimators for `sbi` with recorded steps: `python examples/npe_sbi.py`.

The task is Gaussian and linear, so the posterior is known. sbi's trainer and `fit_posterior` take turns to train the
same estimators on the same simulations. Then sbi draws from a posterior that `fit_posterior` trained.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from statistics import median
from typing import Any

import torch
from sbi.inference import NPE
from sbi.neural_nets import posterior_nn
from sbi.neural_nets.estimators import ConditionalDensityEstimator
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

import wakesleep_ext as ws
from wakesleep_ext.npe import fit_posterior

DIMENSIONS, SIMULATIONS, BATCH = 5, 4000, 200
PRIOR = MultivariateNormal(torch.zeros(DIMENSIONS), torch.eye(DIMENSIONS))
NOISE = 0.5


def simulate(number: int) -> tuple[Tensor, Tensor]:
    theta = torch.randn(number, DIMENSIONS)
    return theta, theta + NOISE * torch.randn(number, DIMENSIONS)


def exact_loss(theta: Tensor, x: Tensor) -> Tensor:
    """Return minus the log-density of the exact posterior, N(x / (1 + NOISE^2), NOISE^2 / (1 + NOISE^2) I)."""
    shrink = 1 / (1 + NOISE**2)
    return -ws.gaussian_log_prob(shrink * x, torch.full((DIMENSIONS,), NOISE**2 * shrink).log(), theta)


class DiagonalGaussian(ConditionalDensityEstimator):
    """A diagonal Gaussian whose mean and log-variance are the output of an MLP."""

    def __init__(self, theta: Tensor, x: Tensor) -> None:
        sizes = x.shape[1], 50, 50, 2 * theta.shape[1]
        layers = [nn.Linear(sizes[0], sizes[1]), nn.ReLU(), nn.Linear(sizes[1], sizes[2]), nn.ReLU()]
        super().__init__(nn.Sequential(*layers, nn.Linear(sizes[2], sizes[3])), theta.shape[1:], x.shape[1:])

    def log_prob(self, input: Tensor, condition: Tensor, **_: Any) -> Tensor:
        return ws.gaussian_log_prob(*ws.gaussian_parameters(self.net(condition)), input)

    def loss(self, input: Tensor, condition: Tensor, **_: Any) -> Tensor:
        return -self.log_prob(input, condition)

    def sample(self, sample_shape: torch.Size, condition: Tensor, **_: Any) -> Tensor:
        return ws.gaussian_rsample(*ws.gaussian_parameters(self.net(condition)), tuple(sample_shape)).detach()


def maf(theta: Tensor, x: Tensor) -> nn.Module:
    return posterior_nn("maf")(theta, x)


def train_by_sbi(network: nn.Module, theta: Tensor, x: Tensor, epochs: int) -> int:
    """Return the number of epochs."""
    trainer = NPE(PRIOR, density_estimator=lambda *_: network, show_progress_bars=False)
    trainer.append_simulations(theta, x).train(training_batch_size=BATCH, max_num_epochs=max(1, epochs - 1))
    return trainer.summary["epochs_trained"][-1]


def train_by_replay(network: nn.Module, theta: Tensor, x: Tensor, epochs: int) -> int:
    """Return the number of epochs."""
    fit = fit_posterior(network, loss_of(network), (theta, x), batch_size=BATCH, max_epochs=epochs)
    if fit.reason:
        print(f"not replayed: {fit.reason}")
    return len(fit.validation_losses)


def loss_of(network: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the estimator's loss, which takes x as the condition."""
    return lambda theta, x: network.loss(theta, condition=x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=540)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # sbi's, about training that stops early and dimensions
    torch.manual_seed(0)
    theta, x = simulate(SIMULATIONS)
    held_out = simulate(10_000)
    per_epoch = int(0.9 * SIMULATIONS) // BATCH
    epochs = -(-options.steps // per_epoch)
    print(f"exact posterior: held-out loss {exact_loss(*held_out).mean():.3f} nats")
    for name, make in (("MAF", maf), ("diagonal Gaussian", DiagonalGaussian)):
        seconds: tuple[list[float], list[float]] = ([], [])
        losses: tuple[list[float], list[float]] = ([], [])
        for _ in range(options.turns):
            start = make(theta, x)
            for train, times, lost in zip((train_by_sbi, train_by_replay), seconds, losses, strict=True):
                network = deepcopy(start)
                began = time.process_time()
                steps = per_epoch * train(network, theta, x, epochs)
                times.append((time.process_time() - began) / steps)
                with torch.no_grad():
                    lost.append(loss_of(network)(*held_out).mean().item())
        for trainer, times, lost in zip(("sbi", "replay"), seconds, losses, strict=True):
            print(f"{name}, {trainer}: held-out loss {median(lost):.3f} nats, {1e3 * median(times):.2f} ms a step")
        print(f"speed: {median(seconds[0]) / median(seconds[1]):.2f} times that of sbi's trainer, {name}")

        posterior = NPE(PRIOR, show_progress_bars=False).build_posterior(network, PRIOR)
        draws = posterior.sample((1000,), x=held_out[1][:1], show_progress_bars=False)
        print(f"{name}: sbi draws a posterior mean of {draws.mean(0)[0]:.2f}, exact {held_out[1][0, 0] / 1.25:.2f}")


if __name__ == "__main__":
    main()
