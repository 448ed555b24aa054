"""Train a neural posterior estimator q(z|x) on simulations with a recorded step: the sleep phase for any network.

The network may come from sbi, zuko or elsewhere. The loss is the mean of -log q(z|x) over pairs of a simulator
(Papamakarios & Murray, "Fast epsilon-free inference of simulation models with Bayesian conditional density estimation",
NeurIPS 2016).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wakesleep_ext.replay import Replay

__all__ = ["Fit", "fit_posterior"]

Pairs = tuple[Tensor, Tensor]


class Fit(NamedTuple):
    """The course of a training."""

    validation_losses: list[float]
    """Mean of -log q(z|x) on held-out simulations after each epoch. The network gets the weights of the smallest."""
    reason: str | None
    """Why steps were not replayed at the end of the training; None if they were."""


def fit_posterior(
    network: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    simulations: Pairs,
    *,
    simulate: Callable[[int], Pairs] | None = None,
    batch_size: int = 200,
    learning_rate: float = 5e-4,
    validation_fraction: float = 0.1,
    stop_after_epochs: int = 20,
    max_epochs: int = 1000,
    clip_norm: float = 5.0,
) -> Fit:
    """Train until the loss on held-out simulations has not improved for some epochs. The defaults are those of sbi.

    Args:
        network: the module to train by Adam.
        loss: maps z `[B, K]` and x `[B, ...]` to -log q(z|x), `[B]`, such as `network.loss` in sbi. Every value that
            changes between calls must be in a tensor; see :class:`wakesleep_ext.replay.Replay`.
        simulations: z `[N, K]` from p(z), and x `[N, ...]` from p(x|z).
        simulate: returns a number of new pairs. If given, each step trains on new pairs, and `simulations` only set the
            held-out pairs and the length of an epoch.
        batch_size: simulations per step. An epoch leaves out an incomplete batch.
        learning_rate: Adam's learning rate.
        validation_fraction: share of the simulations that is held out.
        stop_after_epochs: the number of epochs without an improvement after which training stops.
        max_epochs: greatest number of epochs.
        clip_norm: largest norm of the gradient, to which longer gradients are scaled down; infinite for none.

    Raises:
        ValueError: there are too few simulations for a batch and a held-out pair, or the loss is not finite.
    """
    z, x = simulations
    order = torch.randperm(len(z), device=z.device)
    held_out, trained = order.split([round(validation_fraction * len(z)), len(z) - round(validation_fraction * len(z))])
    if len(x) != len(z) or not len(held_out) or not 0 < batch_size <= len(trained):
        raise ValueError(
            f"fit_posterior: expected as many z as x, for a batch of {batch_size} and held-out simulations, "
            f"got {len(z)} and {len(x)}, of which {len(held_out)} are held out"
        )
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate, fused=True)

    def step(z: Tensor, x: Tensor) -> Tensor:
        optimizer.zero_grad()
        value = loss(z, x).mean()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        optimizer.step()
        return value.detach()

    replayed, validate = Replay(step), torch.no_grad()(lambda: loss(z[held_out], x[held_out]).mean().item())
    losses: list[float] = []
    best = deepcopy(network.state_dict())
    while len(losses) < max_epochs and (not losses or len(losses) - losses.index(min(losses)) <= stop_after_epochs):
        network.train()
        for index in trained[torch.randperm(len(trained), device=z.device)].split(batch_size):
            if len(index) == batch_size:
                replayed(*(simulate(batch_size) if simulate else (z[index], x[index])))
        network.eval()
        losses.append(validate())
        if not losses[-1] < torch.inf:
            raise ValueError(f"fit_posterior: expected a finite loss, got {losses[-1]} after {len(losses)} epochs")
        if losses[-1] == min(losses):
            best = deepcopy(network.state_dict())
    network.load_state_dict(best)
    return Fit(losses, None if replayed.is_replayed else replayed.reason or "there were too few steps")
