"""Train a Gaussian policy by policy gradients: `python examples/gaussian_policy.py`.

The policy learns to drive a point mass in several dimensions to the origin. Log-probabilities and entropy come from
`torch.distributions` or, with one line changed, from the fused ops. Both versions train in alternating steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from wakesleep_ext.distributions import DiagonalGaussian

DIMENSIONS, HORIZON, EPISODES = 16, 20, 256


def eager(mu: Tensor, logvar: Tensor) -> Distribution:
    return Independent(Normal(mu, (logvar / 2).exp(), validate_args=False), 1, validate_args=False)


def fused(mu: Tensor, logvar: Tensor) -> Distribution:
    return DiagonalGaussian(mu, logvar, validate_args=False)


class Policy(nn.Module):
    """The distribution of the force on the mass, given its position and velocity."""

    def __init__(self, distribution: Callable[[Tensor, Tensor], Distribution]) -> None:
        super().__init__()
        self.distribution = distribution
        self.mean = nn.Linear(2 * DIMENSIONS, DIMENSIONS)
        nn.init.zeros_(self.mean.weight)  # random initial forces would make the mass diverge
        nn.init.zeros_(self.mean.bias)
        self.logvar = nn.Parameter(torch.full((DIMENSIONS,), -1.0))

    def forward(self, state: Tensor) -> Distribution:
        return self.distribution(self.mean(state), self.logvar)


@torch.no_grad()
def play(policy: Policy) -> tuple[Tensor, Tensor, Tensor]:
    """Return states, actions and discounted returns, `[HORIZON, EPISODES, ...]`."""
    position, velocity = torch.randn(2, EPISODES, DIMENSIONS)
    states, actions, rewards = [], [], []
    for _ in range(HORIZON):
        states.append(torch.cat((position, velocity), -1))
        actions.append(policy(states[-1]).sample())
        velocity = 0.8 * velocity + 0.3 * actions[-1]
        position = position + 0.3 * velocity
        rewards.append(-position.square().mean(-1) - 0.01 * actions[-1].square().mean(-1))
    returns = [rewards[-1]]
    for reward in reversed(rewards[:-1]):
        returns.insert(0, reward + 0.9 * returns[0])
    return torch.stack(states), torch.stack(actions), torch.stack(returns)


def loss(policy: Policy, states: Tensor, actions: Tensor, returns: Tensor) -> Tensor:
    """Return the REINFORCE loss with a baseline for each time step and an entropy bonus."""
    advantage = (returns - returns.mean(1, keepdim=True)) / returns.std()
    action = policy(states)
    return -(advantage * action.log_prob(actions)).mean() - 1e-3 * action.entropy().mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    policies, optimizers, seconds = [], [], ([], [])
    for distribution in (eager, fused):
        torch.manual_seed(0)
        policies.append(Policy(distribution))
        optimizers.append(torch.optim.Adam(policies[-1].parameters(), lr=3e-2))
    rewards: list[list[float]] = [[], []]
    for _ in range(steps):
        for policy, optimizer, times, gained in zip(policies, optimizers, seconds, rewards, strict=True):
            episodes = play(policy)
            gained.append(episodes[2][0].mean().item())
            start = time.perf_counter()
            optimizer.zero_grad()
            loss(policy, *episodes).backward()
            times.append(time.perf_counter() - start)
            optimizer.step()
    for name, gained, times in zip(("eager", "fused"), rewards, seconds, strict=True):
        print(f"{name}: return from {gained[0]:.2f} to {gained[-1]:.2f}, {1e3 * median(times):.2f} ms an update")
    print(f"speed: {median(seconds[0]) / median(seconds[1]):.2f} times that of eager")


if __name__ == "__main__":
    main()
