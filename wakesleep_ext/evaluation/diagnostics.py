"""Find out where an amortised posterior fails: calibration, importance weights, and the noise of its gradients.

:func:`diagnose` takes any simulator and any posterior, such as your own networks or those of another package.
:func:`diagnose_machine` takes a Helmholtz machine, whose dreams are the simulations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, get_args

import torch
from torch import Tensor

from wakesleep_ext import random
from wakesleep_ext.evaluation._arviz import arviz_stats
from wakesleep_ext.evaluation.calibration import Posterior, Ranks, calibrate
from wakesleep_ext.evaluation.gradient_noise import GradientNoise, gradient_noise
from wakesleep_ext.evaluation.importance import WeightedDraws, gathered, pareto_k, pareto_threshold, weighted_draws
from wakesleep_ext.helmholtz import objectives
from wakesleep_ext.helmholtz.config import PATHWISE, PhiGradient
from wakesleep_ext.helmholtz.models import HelmholtzMachine

LogJoint = Callable[[Tensor, Tensor], Tensor]
"""Maps z `[K, N, D]` and x `[N, ...]` to log p(x, z), `[K, N]`."""
Progress = Callable[[str, int], Callable[[int], object]]
"""Called before each part with its name and size; returns a function that takes the amount just completed."""

_REGIONS = 0.5, 0.9
"""Credibilities of the regions whose coverage the summary gives."""


@dataclass(frozen=True)
class Diagnosis:
    """The results of :func:`diagnose`."""

    layers: Sequence[Ranks]
    """Simulation-based calibration of the latent variables of each layer."""
    coverage: Ranks
    """Expected coverage of the highest-density regions of q."""
    tarp: Ranks
    """TARP."""
    num_weights: int = 0
    """Number of importance weights per observation."""
    pareto_k: Tensor | None = None
    """Pareto's k of the importance weights of each observation: float64 `[N]`. None without a joint density."""
    gradients: Mapping[str, GradientNoise] = field(default_factory=dict)
    """Noise of the recognition network's gradient for each objective."""

    @property
    def ranks(self) -> dict[str, Ranks]:
        """The ranks of every calibration test, by name."""
        one = len(self.layers) == 1
        names = ["SBC" if one else f"SBC of layer {layer}" for layer in range(1, len(self.layers) + 1)]
        return {**dict(zip(names, self.layers, strict=True)), "expected coverage": self.coverage, "TARP": self.tarp}

    def summary(self) -> dict[str, Any]:
        """Return a summary that can be saved as JSON."""
        outside = {name: ranks.outside().sum().item() for name, ranks in self.ranks.items()}
        curve, places = self.coverage.ecdf()[:, 0], self.coverage.num_samples + 1
        summary: dict[str, Any] = {
            "simulations": len(self.coverage.ranks),
            "draws": self.coverage.num_samples,
            "outside_band": outside,
            "functions": {name: ranks.ranks.shape[1] for name, ranks in self.ranks.items()},
            "coverage": {f"{region:g}": curve[round(region * places) - 1].item() for region in _REGIONS},
        }
        if self.pareto_k is not None:
            k, threshold = self.pareto_k, pareto_threshold(self.num_weights)
            summary["pareto_k"] = {
                "median": _or_none(k.nanmedian().item()),
                "threshold": threshold,
                "share_above": (k > threshold).double().mean().item(),
                "undefined": int(k.isnan().sum()),
                "observations": len(k),
                "weights": self.num_weights,
            }
        if self.gradients:
            summary["gradient_signal_to_noise"] = {
                name: _or_none(found.ratio) for name, found in self.gradients.items()
            }
        return summary

    def table(self) -> str:
        """Format the summary as a table."""
        found = self.summary()
        heads = {"": f"{found['simulations']} simulations, {found['draws']} draws from q each"}
        rows: dict[str, str] = {}
        for name, outside in found["outside_band"].items():
            functions = found["functions"][name]
            of_many = f"{outside} of {functions} variables outside"
            rows[name] = f"{of_many if functions > 1 else 'outside' if outside else 'inside'} the 95% band"
        for region, share in found["coverage"].items():
            rows[f"  coverage of {float(region):.0%} regions"] = f"{share:.1%}"
        if (k := found.get("pareto_k")) is not None:
            median = "infinite" if k["median"] is None else f"{k['median']:.2f}"
            rows["Pareto k"] = (
                f"median {median}, above {k['threshold']:.2f} for {k['share_above']:.1%} of {k['observations']} "
                f"observations, {k['weights']} weights each"
            )
            if k["undefined"]:
                rows["  undefined"] = f"for {k['undefined']} observations: equal weights"
        if self.gradients:
            rows["Signal to noise of the gradient for q"] = ""
            rows |= {
                f"  {name}": "no noise" if ratio is None else f"{ratio:.3f}"
                for name, ratio in found["gradient_signal_to_noise"].items()
            }
        width = max(map(len, rows))
        return "\n".join(f"{name:{width}}  {value}".rstrip() for name, value in (heads | rows).items())


def diagnose(
    z: Tensor,
    x: Tensor,
    posterior: Posterior,
    log_joint: LogJoint | None = None,
    *,
    observed: Tensor | None = None,
    layers: Sequence[int] | None = None,
    num_samples: int = 99,
    num_weights: int = 1000,
    seed: int = 0,
    progress: Progress = lambda part, size: lambda finished: None,
) -> Diagnosis:
    """Run every diagnostic of an amortised posterior, except for those of gradients.

    Args:
        z: latent variables of N simulations, `[N, K]`, from p(z).
        x: what was observed, `[N, ...]`, from p(x|z).
        posterior: q(z|x).
        log_joint: log p(x, z), for the importance weights. Omit it if it cannot be computed.
        observed: the observations whose importance weights are measured, like x. The default is x.
        layers: sizes of the parts of z that are reported separately. The default is one part.
        num_samples: draws from q per simulation.
        num_weights: importance weights per observation.
        seed: seed of the order of equal values. The draws are the posterior's own.
        progress: shows the progress of each part.

    Raises:
        ValueError: a shape does not fit, or a number is NaN.
        ModuleNotFoundError: `arviz-stats` is not installed.
    """
    arviz_stats()  # fails before the work if it is missing
    marginals, coverage, tarp = calibrate(
        z, x, posterior, num_samples, seed=seed, on_simulations=progress("Calibration", len(z))
    )
    parts = [Ranks(part, num_samples) for part in marginals.ranks.split(list(layers or z.shape[1:]), 1)]
    k = None
    if log_joint is not None:
        observed = x if observed is None else observed
        on_observations = progress("Importance weights", len(observed))
        k = importance_pareto_k(observed, posterior, log_joint, num_weights, on_observations=on_observations)
    return Diagnosis(parts, coverage, tarp, num_weights, k)


@torch.no_grad()
def importance_pareto_k(
    x: Tensor,
    posterior: Posterior,
    log_joint: LogJoint,
    num_weights: int = 1000,
    *,
    chunk_rows: int = 20_000,
    on_observations: Callable[[int], object] = lambda observations: None,
) -> Tensor:
    """Return Pareto's k of weights w = p(x, z) / q(z|x) for each observation: float64 `[N]`, on the CPU.

    See :func:`wakesleep_ext.evaluation.importance.pareto_k`.

    Args:
        x: observations `[N, ...]`.
        posterior: q(z|x).
        log_joint: log p(x, z).
        num_weights: weights per observation, at least 25.
        chunk_rows: greatest number of draws in memory.
        on_observations: called with the number of observations just completed.

    Raises:
        ValueError: `log_joint` returns another shape, or :func:`pareto_k` rejects the weights.
    """

    def draw(of_x: Tensor, number: int) -> WeightedDraws:
        z, log_q = posterior.draw(of_x, number)
        log_p = log_joint(z, of_x)
        if log_p.shape != log_q.shape:
            raise ValueError(
                f"importance_pareto_k: expected log_joint(z, x) to have shape {list(log_q.shape)}, "
                f"got {list(log_p.shape)}"
            )
        return WeightedDraws([z], torch.stack((log_p.double(), -log_q.double())))

    found = []
    for group, chunks in weighted_draws(draw, x, num_weights, chunk_rows):
        found.append(pareto_k(*gathered(chunks)))
        on_observations(len(group))
    return torch.cat(found)


def diagnose_machine(
    machine: HelmholtzMachine,
    x: Tensor,
    num_simulations: int = 1000,
    *,
    num_weights: int = 1000,
    num_gradients: int = 200,
    num_samples: int = 5,
    batch_size: int = 100,
    seed: int = 0,
    progress: Progress = lambda part, size: lambda finished: None,
) -> Diagnosis:
    """Run every diagnostic of a Helmholtz machine's recognition network.

    Its dreams are the simulations. The latent variables of all layers form one vector z, and simulation-based
    calibration is reported for each layer. Equal values of Bernoulli variables are ranked in random order.

    Args:
        machine: the model.
        x: images whose importance weights are measured, at most `num_simulations` of them, and on which wake phases
            compute gradients: binary pixels `[N, D]`.
        num_simulations: number of dreams.
        num_weights: importance weights per image; 0 leaves this part out.
        num_gradients: gradients per objective; fewer than two leave this part out.
        num_samples: L of the objectives, at least 2.
        batch_size: images, or dreams, per gradient.
        seed: seed of all draws.
        progress: shows the progress of each part.
    """
    recognition, generative = machine.recognition, machine.generative
    keys = (random.make_key(seed, number, x.device) for number in count())
    latents, dreams = generative.dream(num_simulations, keys=[next(keys) for _ in generative])
    sizes = [z.shape[-1] for z in latents]

    def draw(given: Tensor, number: int) -> Tensor:
        return torch.cat(recognition.rsample(given, number, keys=[next(keys) for _ in recognition]), -1)

    def log_joint(z: Tensor, given: Tensor) -> Tensor:
        return generative.log_prob(z.split(sizes, -1), given)

    found = diagnose(
        torch.cat(latents, -1),
        dreams,
        Posterior(draw, lambda z, given: recognition.log_prob(z.split(sizes, -1), given)),
        log_joint if num_weights else None,
        observed=x[:num_simulations],
        layers=sizes,
        num_weights=num_weights,
        seed=seed,
        progress=progress,
    )
    losses = recognition_losses(machine, x, num_samples, batch_size, keys) if num_gradients > 1 else {}
    on_objective = progress("Gradients", len(losses))
    gradients = {}
    for name, loss in losses.items():
        gradients[name] = gradient_noise(loss, recognition.parameters(), num_gradients)
        on_objective(1)
    return Diagnosis(found.layers, found.coverage, found.tarp, num_weights, found.pareto_k, gradients)


def recognition_losses(
    machine: HelmholtzMachine, x: Tensor, num_samples: int, batch_size: int, keys: Iterator[Tensor]
) -> dict[str, Callable[[], Tensor]]:
    """Return the losses that train a recognition network, by objective. Each call draws images, latents or dreams.

    Objectives that differentiate through the draws are left out if the latent variables are discrete.

    Args:
        machine: the model.
        x: images to draw batches from, `[N, D]`.
        num_samples: L, at least 2.
        batch_size: images, or dreams, per call.
        keys: random keys on the device of x, without end.
    """
    recognition, generative = machine.recognition, machine.generative
    objectives.require_several(num_samples, "all objectives")

    def batch() -> Tensor:
        order = random.uniforms(next(keys).cpu(), (len(x),)).argsort().to(x.device)
        return x[order[:batch_size]]

    def draws() -> list[Tensor]:
        return [next(keys) for _ in recognition]

    def wake(phi_gradient: PhiGradient) -> Tensor:
        theta, phi = objectives.reweighted_wake_losses(
            recognition, generative, batch(), num_samples, phi_gradient=phi_gradient, keys=draws()
        )
        return theta if phi is None else phi

    def sleep() -> Tensor:
        return objectives.sleep_phi_loss(recognition, generative, batch_size, keys=[*draws(), next(keys)])

    def bound(loss: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: loss(recognition, generative, batch(), num_samples, keys=draws())

    pathwise = recognition.has_rsample
    estimators: list[PhiGradient] = [name for name in get_args(PhiGradient) if pathwise or name not in PATHWISE]
    found: dict[str, Callable[[], Tensor]] = {"sleep": sleep}
    found |= {f"wake-phi {name}": partial(wake, name) for name in estimators}
    found["vimco"] = bound(objectives.vimco_loss)
    if pathwise:
        of_draws = {"elbo": objectives.elbo_loss, "iwae": objectives.iwae_loss, "dreg": objectives.dreg_loss}
        found |= {name: bound(loss) for name, loss in of_draws.items()}
    return found


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
