"""Training options and named recipes. Importing this module does not import torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from wakesleep_ext.helmholtz.config import PATHWISE, PhiGradient

Objective = Literal["wake-sleep", "reweighted-wake-sleep", "elbo", "iwae", "dreg", "vimco"]
Schedule = Literal["exponential", "staged"]
Recipe = Literal["digits", "mnist", "burda"]
Precision = Literal["float32", "tf32", "bfloat16"]

SLEEP_WEIGHTS: dict[Objective, float] = {
    "wake-sleep": 1.0,
    "reweighted-wake-sleep": 0.5,
    "elbo": 0.0,
    "iwae": 0.0,
    "dreg": 0.0,
    "vimco": 0.0,
}
"""The weight of the sleep phase by objective, for reweighted wake-sleep that of Bornschein & Bengio."""


DIGITS = "digits"
"""Name of the data set that ships with scikit-learn."""


class Phases(NamedTuple):
    """What the phases of a step compute."""

    phi_gradient: PhiGradient | None
    """The estimate of the recognition network's gradient in the reweighted wake phase; None without such a phase."""
    sleep_weight: float
    losses: list[str]
    """Names of the losses of a step with a wake phase."""


@dataclass(frozen=True)
class RunOptions:
    """Options for the data of a run and for its final evaluation."""

    data: str = DIGITS
    """"digits", a folder of IDX files such as MNIST's, or an .npz file with two arrays of images."""
    train_array: str = "x_train"
    """Name of the array of training images in the .npz file."""
    test_array: str = "x_test"
    """Name of the array of test images in the .npz file."""
    bound_samples: int = 1000
    """Samples per test image for the log-likelihood bound that is reported at the end."""


@dataclass(frozen=True)
class TrainConfig:
    """Training options.

    Raises:
        ValueError: a value is out of range, or conflicts with another.
    """

    objective: Objective = "wake-sleep"
    """Plain or reweighted wake-sleep, the ELBO, or the L-sample bound: differentiated through the draws (iwae), with
    doubly reparameterised gradients (dreg), or for discrete latents (vimco). See
    `wakesleep_ext.helmholtz.objectives`."""
    sleep_weight: float | None = None
    """Weight w of the sleep phase in the recognition network's gradient, from 0 (wake-wake) to 1. The reweighted wake
    phase has weight 1 - w. For reweighted wake-sleep, the default is 0.05 with the estimates that differentiate through
    the draws, and 0.5 with the others. The weight is always 1 for wake-sleep, and 0 for the bounds."""
    phi_gradient: PhiGradient | None = None
    """Estimate of the recognition network's gradient in the reweighted wake phase: the score function, with a control
    variate (score-cv), doubly reparameterised (dreg), or sticking the landing (stl). The default is dreg for Gaussian
    latent variables, and score for discrete ones, for one sample or with a defensive fraction."""
    defensive_fraction: float = 0.0
    """Probability of drawing z from the prior instead of q in the reweighted wake phase."""
    seed: int = 0
    """Seed of the initial weights and all draws."""
    epochs: int = 500
    """Passes over the training images."""
    patience: int | None = None
    """Stop when the test ELBO has not improved for this number of epochs; by default, train all epochs. The test ELBO
    then chooses the length of the training, so it is no longer an unbiased measure."""
    sleep_warm_up: int = 0
    """Number of initial epochs that run only the sleep phase."""
    batch_size: int = 100
    """Images per wake phase."""
    num_samples: int = 1
    """Samples of z per image in the wake phase, L."""
    num_dreams: int | None = None
    """Dreams per sleep phase; the batch size by default."""
    generative_learning_rate: float = 1e-3
    """Initial learning rate of the generative network, which the wake phase trains."""
    recognition_learning_rate: float = 1e-3
    """Initial learning rate of the recognition network, which the sleep phase trains."""
    learning_rate_decay: float = 1.0
    """Ratio of the final to the initial learning rates; 1 keeps the learning rates constant."""
    schedule: Schedule = "exponential"
    """When learning rates fall: at every step (exponential), or after each stage (staged). Stage i = 0, 1, ... has 3^i
    epochs. The learning rates fall by the same factor each time."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates for the running means of the gradient and its square."""
    adam_epsilon: float = 1e-4
    """Adam's epsilon."""
    max_gradient_norm: float | None = None
    """Scale the gradient of each network down to this norm if it is larger; by default, gradients keep their norm."""
    precision: Precision = "float32"
    """Precision of matrix products, whatever `torch.autocast` says outside. "tf32" rounds the factors of large products
    to 11 significant bits; only a GPU has it. "bfloat16" rounds the factors and outputs of all layers to 8 bits, and so
    Gaussian latent variables. Log-likelihoods, weights, moments and an MLP's logits of images stay in float32."""
    replay: bool = True
    """Record a step and replay it: as a CUDA graph on a GPU, or as a list of operator calls on a CPU. The results are
    the same as without replay. A replay runs no Python, so networks must store every value that changes between steps
    in a tensor. If anything else changes, the step is recorded again. A step is not recorded if a network has hooks or
    if its Python code reads tensor values."""
    steps_per_replay: int = 1
    """Number of steps in one replay. Several steps wait less for the host, and give the same results. Saves, signals
    and callbacks wait for the last one. If fewer steps remain in an epoch, they are replayed one at a time."""

    def __post_init__(self) -> None:
        within = {
            "objective": self.objective in get_args(Objective),
            "sleep_weight": self.sleep_weight is None or 0 <= self.sleep_weight <= 1,
            "phi_gradient": self.phi_gradient in (None, *get_args(PhiGradient)),
            "defensive_fraction": 0 <= self.defensive_fraction < 1,
            "seed": 0 <= self.seed < 2**63,
            "epochs": self.epochs >= 0,
            "patience": self.patience is None or self.patience >= 1,
            "sleep_warm_up": self.sleep_warm_up >= 0,
            "batch_size": self.batch_size >= 1,
            "num_samples": self.num_samples >= 1,
            "num_dreams": self.num_dreams is None or self.num_dreams >= 1,
            "generative_learning_rate": 0 < self.generative_learning_rate < math.inf,
            "recognition_learning_rate": 0 < self.recognition_learning_rate < math.inf,
            "learning_rate_decay": 0 < self.learning_rate_decay <= 1,
            "schedule": self.schedule in get_args(Schedule),
            "adam_betas": all(0 <= beta < 1 for beta in self.adam_betas),
            "adam_epsilon": 0 <= self.adam_epsilon < math.inf,
            "max_gradient_norm": self.max_gradient_norm is None or 0 < self.max_gradient_norm < math.inf,
            "precision": self.precision in get_args(Precision),
            "steps_per_replay": self.steps_per_replay >= 1,
        }
        for name, valid in within.items():
            if not valid:
                raise ValueError(f"TrainConfig: {name} is out of range, got {getattr(self, name)}")
        reweighted = self.objective == "reweighted-wake-sleep"
        if not reweighted and self.sleep_weight not in (None, SLEEP_WEIGHTS[self.objective]):
            raise ValueError(
                f"TrainConfig: expected sleep_weight {SLEEP_WEIGHTS[self.objective]:g} with objective "
                f"{self.objective!r}, got {self.sleep_weight}"
            )
        if not reweighted and self.defensive_fraction:
            raise ValueError(
                f"TrainConfig: expected defensive_fraction 0 with objective {self.objective!r}, "
                f"got {self.defensive_fraction}"
            )
        if not reweighted and self.phi_gradient is not None:
            raise ValueError(
                f"TrainConfig: expected phi_gradient None with objective {self.objective!r}, got {self.phi_gradient!r}"
            )
        if self.schedule == "staged" and self.epochs not in (of_stages := [(3**n - 1) // 2 for n in range(1, 20)]):
            raise ValueError(
                f"TrainConfig: expected epochs that make up whole stages ({', '.join(map(str, of_stages[:8]))}, ...) "
                f"with a staged schedule, got {self.epochs}"
            )

    def phases(self, has_rsample: bool) -> Phases:
        """Return what the phases of a step compute, with the defaults of the objective.

        Args:
            has_rsample: whether all draws of latent variables are differentiable.
        """
        gradient, weight = self.phi_gradient, self.sleep_weight
        is_reweighted = self.objective == "reweighted-wake-sleep"
        if gradient is None and is_reweighted:
            is_pathwise = has_rsample and self.num_samples > 1 and not self.defensive_fraction
            gradient = "dreg" if is_pathwise else "score"
        if weight is None:
            weight = 0.05 if gradient in PATHWISE else SLEEP_WEIGHTS[self.objective]
        has_two = is_reweighted and gradient not in PATHWISE and weight < 1
        return Phases(gradient, weight, ["wake"] + ["wake_phi"] * has_two + ["sleep"] * (weight > 0))

    def has_stalled(self, test_elbos: Sequence[float]) -> bool:
        """Return True if the last `patience` of the test ELBOs, one per epoch, do not exceed those before them."""
        patience = self.patience
        if patience is None or len(test_elbos) <= patience:
            return False
        return max(test_elbos[-patience:]) <= max(test_elbos[:-patience])

    @property
    def stages(self) -> list[int]:
        """The first epoch of each stage of a staged schedule, counted from 0."""
        starts = [0]
        while (following := 3 * starts[-1] + 1) < self.epochs:
            starts.append(following)
        return starts


RECIPES: dict[Recipe, TrainConfig] = {
    "digits": TrainConfig(),
    "mnist": TrainConfig(epochs=100, learning_rate_decay=0.1),
    "burda": TrainConfig(epochs=3280, batch_size=20, learning_rate_decay=0.1, schedule="staged"),
}
"""Named sets of training options, for any objective. "digits" is the default, and "mnist" a short protocol for MNIST.
"burda" is the protocol of Burda, Grosse & Salakhutdinov ("Importance weighted autoencoders", ICLR 2016). It has eight
stages, with 9.84 million steps on MNIST in total."""
