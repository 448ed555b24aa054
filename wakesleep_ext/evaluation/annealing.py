r"""Estimate log p(x) by annealed importance sampling (Neal 2001), with a standard error.

Chains move from the prior to the posterior of an image through :math:`f_\beta(z) = p(z)\, p(x \mid z)^\beta`. This is
the method of Wu, Burda, Salakhutdinov & Grosse, "On the quantitative analysis of decoder-based generative models" (ICLR
2017), with the sigmoidal schedule of section 4 and Hamiltonian Monte Carlo. Chains start from the prior, not from q. So
the estimate does not depend on the recognition network, and finds modes that q misses. Comparing this estimate with the
importance-weighted bound shows how accurate the bound is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import reduce
from itertools import count, pairwise
from typing import ClassVar

import torch
from torch import Tensor

from wakesleep_ext import ops, random
from wakesleep_ext.densities import Family
from wakesleep_ext.evaluation.importance import ImportanceWeights
from wakesleep_ext.helmholtz.models import GenerativeNetwork

_PILOT_CHAINS = 4
_TARGET_ACCEPTANCE = 0.65
_ADAPTATION = 0.2  # change of the log step size per unit by which the acceptance rate deviates from its target
_SCHEDULE_SLOPE = 4.0
_JITTER = 0.2  # standard deviation of the log step size over chains; random step sizes avoid periodic trajectories


@dataclass(frozen=True)
class AnnealedLogLikelihood:
    """Estimates of log p(x) in nats, one per image: float64 `[N]`, on the CPU."""

    log_likelihood: Tensor
    """Log of the mean weight of the chains. The mean weight is unbiased, so the expectation of its log is below
    log p(x). If the standard error is small, the bias is half the square of the standard error."""
    standard_error: Tensor
    """Standard error of `log_likelihood`, from the spread of the weights; NaN for a single chain."""
    acceptance: Tensor
    """Mean acceptance probability of the transitions."""

    @property
    def mean(self) -> float:
        """Mean log-likelihood over images."""
        return self.log_likelihood.mean().item()

    @property
    def standard_error_of_mean(self) -> float:
        """Standard error of :attr:`mean` due to the random chains. The chains of different images are independent."""
        return self.standard_error.square().sum().sqrt().item() / len(self.standard_error)


def annealed_log_likelihood(
    generative: GenerativeNetwork,
    x: Tensor,
    num_chains: int = 16,
    num_temperatures: int = 1000,
    *,
    moves: int = 10,
    seed: int = 0,
    chunk_rows: int = 2000,
    on_images: Callable[[int], object] = lambda images: None,
) -> AnnealedLogLikelihood:
    r"""Estimate the log-likelihood of each image by annealed importance sampling.

    .. math:: \log \frac1C\sum_c w_c, \qquad
        \log w_c = \sum_{t=1}^{T} (\beta_t - \beta_{t-1}) \log p_\theta(x \mid z_{c,t-1}),
        \quad z_{c,0} \sim p(z),\; z_{c,t} \sim \mathcal T_{\beta_t}(\cdot \mid z_{c,t-1})

    where each transition leaves :math:`p(z)\, p(x|z)^{\beta_t}` invariant. For Gaussian latent variables, Hamiltonian
    Monte Carlo moves the standard normal noise that determines z. So the prior of the state is N(0, I) for any number
    of layers. For Bernoulli latent variables, a Metropolis transition proposes to flip randomly chosen ones. Step sizes
    are adapted to each image and temperature on four extra pilot chains. The pilot chains do not enter the estimate, so
    adaptation does not bias the estimate.

    Args:
        generative: the network to evaluate; its latent variables must be all Gaussian or all Bernoulli.
        x: binary pixels `[N, D]`, bool, uint8 or floating point, on the device of the network.
        num_chains: C, per image.
        num_temperatures: T.
        moves: leapfrog steps (Gaussian) or Metropolis proposals (Bernoulli) per transition. Each of the (C + 4) N
            chains computes `moves` x T gradients or log-probabilities.
        seed: the same seed and chunk size give the same chains.
        chunk_rows: number of chains that run together. Memory use depends only on this number.
        on_images: called with the number of images just completed.

    Raises:
        ValueError: a count is below 1, or the latent variables are neither all Gaussian nor all Bernoulli.
    """
    counts = {"num_chains": num_chains, "num_temperatures": num_temperatures, "moves": moves, "chunk_rows": chunk_rows}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"annealed_log_likelihood: expected {name} >= 1, got {value}")
    kind = _kind(generative, x)
    generative = deepcopy(generative).requires_grad_(False)  # only z needs gradients
    keys = (random.make_key(seed, draw, x.device) for draw in count())
    betas = _sigmoidal(num_temperatures)
    weights, acceptances = [], []
    for images in x.split(max(1, chunk_rows // max(num_chains, _PILOT_CHAINS))):
        step_sizes = _adapted_step_sizes(kind(generative, images, _PILOT_CHAINS, moves, keys), betas)
        chains = kind(generative, images, num_chains, moves, keys)
        log_w = torch.zeros_like(chains.log_likelihood, dtype=torch.float64)
        acceptance = torch.zeros_like(log_w[0])
        for (before, beta), step_size in zip(pairwise(betas), step_sizes, strict=True):
            log_w += (beta - before) * chains.log_likelihood
            acceptance += chains.move(beta, step_size)
        weights.append(ImportanceWeights(len(images), x.device))
        weights[-1].add(log_w)
        acceptances.append(acceptance / num_temperatures)
        on_images(len(images))
    return AnnealedLogLikelihood(
        torch.cat([of_images.log_mean for of_images in weights]).cpu(),
        torch.cat([of_images.standard_error for of_images in weights]).cpu(),
        torch.cat(acceptances).cpu(),
    )


class _Chains(ABC):
    """Markov chains `[C, N]`, C per image, that start from the prior."""

    family: ClassVar[Family]
    """The family of latent variables that this class can move."""
    first_step_size: ClassVar[float]

    state: Tensor
    """The current state of the chains, `[C, N, K]`, with all layers concatenated."""
    log_likelihood: Tensor
    """log p(x|z) at the state, `[C, N]`."""

    def __init__(
        self, generative: GenerativeNetwork, x: Tensor, num_chains: int, moves: int, keys: Iterator[Tensor]
    ) -> None:
        self._generative, self._x, self._moves, self._keys = generative, x, moves, keys
        latents = generative.sample_latents((num_chains, len(x)), keys=[next(keys) for _ in generative[1:]])
        self._sizes = [z.shape[-1] for z in latents]
        self.state = torch.cat(latents, dim=-1)

    @abstractmethod
    def move(self, beta: float, step_size: Tensor) -> Tensor:
        """Run one transition at temperature beta with step sizes `[N]`. Return mean acceptance probabilities, `[N]`."""


class _Hamiltonian(_Chains):
    """Moves the noise e ~ N(0, I), from which z_T, ..., z_1 are computed as when sampling from the prior."""

    family = "gaussian"
    first_step_size = 0.3

    def __init__(
        self, generative: GenerativeNetwork, x: Tensor, num_chains: int, moves: int, keys: Iterator[Tensor]
    ) -> None:
        super().__init__(generative, x, num_chains, moves, keys)
        self.state = self._normals(self.state)
        self.log_likelihood, self._gradient = self._likelihood(self.state)

    def move(self, beta: float, step_size: Tensor) -> Tensor:
        step = (step_size * (_JITTER * self._normals(self.log_likelihood)).exp()).unsqueeze(-1)
        state, log_likelihood, gradient = self.state, self.log_likelihood, self._gradient
        start = self._normals(state)
        momentum = start + step / 2 * (beta * gradient - state)
        for move in range(1, self._moves + 1):
            state = state + step * momentum
            log_likelihood, gradient = self._likelihood(state)
            momentum = momentum + (step if move < self._moves else step / 2) * (beta * gradient - state)
        energy = (state.square() - self.state.square() + momentum.square() - start.square()).sum(-1) / 2
        accepted, probability = _metropolis(beta * (log_likelihood - self.log_likelihood) - energy, next(self._keys))
        self.state = torch.where(accepted.unsqueeze(-1), state, self.state)
        self.log_likelihood = torch.where(accepted, log_likelihood, self.log_likelihood)
        self._gradient = torch.where(accepted.unsqueeze(-1), gradient, self._gradient)
        return probability.mean(0)

    def _normals(self, like: Tensor) -> Tensor:
        zeros = torch.zeros_like(like)
        return ops.gaussian_rsample(zeros, zeros, key=next(self._keys))

    def _likelihood(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(x|z) and its gradient with respect to the noise."""
        noise = noise.detach().requires_grad_()
        of_x, *of_latents = self._generative
        z: Tensor | None = None
        with torch.enable_grad():
            for conditional, e in zip(reversed(of_latents), reversed(noise.split(self._sizes, dim=-1)), strict=True):
                z = conditional(z).from_noise(e)
            log_likelihood = of_x(z).log_prob(self._x)
            (gradient,) = torch.autograd.grad(log_likelihood.sum(), noise)
        return log_likelihood.detach(), gradient


class _Flips(_Chains):
    """Moves Bernoulli variables; the step size is the mean number of variables that a proposal flips."""

    family = "bernoulli"
    first_step_size = 1.0

    def __init__(
        self, generative: GenerativeNetwork, x: Tensor, num_chains: int, moves: int, keys: Iterator[Tensor]
    ) -> None:
        super().__init__(generative, x, num_chains, moves, keys)
        self._log_prior, self.log_likelihood = self._log_probs(self.state)

    def move(self, beta: float, step_size: Tensor) -> Tensor:
        chance = (step_size / self.state.shape[-1]).clamp(max=0.5)
        log_odds = chance.logit().to(self.state.dtype).unsqueeze(-1).expand_as(self.state)
        acceptance = torch.zeros_like(step_size)
        for _ in range(self._moves):
            state = (self.state - ops.bernoulli_sample(log_odds, key=next(self._keys))).abs()
            log_prior, log_likelihood = self._log_probs(state)
            log_ratio = log_prior - self._log_prior + beta * (log_likelihood - self.log_likelihood)
            accepted, probability = _metropolis(log_ratio, next(self._keys))
            self.state = torch.where(accepted.unsqueeze(-1), state, self.state)
            self._log_prior = torch.where(accepted, log_prior, self._log_prior)
            self.log_likelihood = torch.where(accepted, log_likelihood, self.log_likelihood)
            acceptance += probability.mean(0)
        return acceptance / self._moves

    @torch.no_grad()
    def _log_probs(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(z) and log p(x|z)."""
        factors = self._generative.factors(state.split(self._sizes, dim=-1), self._x)
        log_likelihood, *of_latents = [factor.log_prob() for factor in factors]
        return reduce(torch.add, of_latents), log_likelihood


def _metropolis(log_ratio: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return a mask of the accepted proposals, and all acceptance probabilities. NaN ratios are rejected."""
    log_probability = log_ratio.nan_to_num(nan=-torch.inf).clamp_max(0.0)
    log_odds = log_probability - torch.log(-torch.expm1(log_probability))
    accepted = ops.bernoulli_sample(log_odds.unsqueeze(-1), dtype=torch.bool, key=key).squeeze(-1)
    return accepted, log_probability.exp()


def _adapted_step_sizes(chains: _Chains, betas: Sequence[float]) -> list[Tensor]:
    """Return step sizes `[N]` for each temperature, adapted by running these chains.

    The target is the best acceptance rate of Hamiltonian Monte Carlo (Neal, "MCMC using Hamiltonian dynamics", 2011).
    """
    step_size = torch.full_like(chains.log_likelihood[0], chains.first_step_size)
    step_sizes = []
    for beta in betas[1:]:
        step_sizes.append(step_size)
        step_size = step_size * torch.exp(_ADAPTATION * (chains.move(beta, step_size) - _TARGET_ACCEPTANCE))
    return step_sizes


def _kind(generative: GenerativeNetwork, x: Tensor) -> type[_Chains]:
    """Return the chain class that can move the latent variables of this network."""
    latents = generative.sample_latents((1,), keys=[random.make_key(0, device=x.device)] * (len(generative) - 1))
    _, *factors = generative.factors(latents, x[:1])
    found = [factor.distribution for factor in factors]
    for kind in (_Hamiltonian, _Flips):
        if all(p.family == kind.family for p in found):
            return kind
    names = ", ".join(type(p).__name__ for p in found)
    raise ValueError(
        "annealed_log_likelihood: expected the latent variables of generative to be all Gaussian or all Bernoulli, "
        f"got {names}"
    )


def _sigmoidal(num_temperatures: int) -> list[float]:
    """Return temperatures from 0 to 1, most closely spaced at both ends."""
    ends = torch.linspace(-_SCHEDULE_SLOPE, _SCHEDULE_SLOPE, num_temperatures + 1, dtype=torch.float64).sigmoid()
    betas: list[float] = ((ends - ends[0]) / (ends[-1] - ends[0])).tolist()
    return betas
