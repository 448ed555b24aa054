"""How a machine is trained: every number of it, and protocols by name. Importing it is cheap: it does without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Objective = Literal["wake-sleep", "reweighted-wake-sleep", "elbo", "iwae", "dreg"]
Schedule = Literal["exponential", "staged"]
Recipe = Literal["digits", "mnist", "burda"]

SLEEP_WEIGHTS: dict[Objective, float] = {
    "wake-sleep": 1.0,
    "reweighted-wake-sleep": 0.5,
    "elbo": 0.0,
    "iwae": 0.0,
    "dreg": 0.0,
}
"""The part of the sleep phase where none is asked for."""


DIGITS = "digits"
"""Name of the data set that ships with scikit-learn."""


@dataclass(frozen=True)
class RunOptions:
    """What to train on, and what to report."""

    data: str = DIGITS
    """"digits", a folder of IDX files such as MNIST's, or a .npz file with uint8 or bool arrays x_train and x_test."""
    bound_samples: int = 1000
    """Samples per test image for the bound that is reported at the end."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Raises:
        ValueError: a value is out of range, or does not go with the others.
    """

    objective: Objective = "wake-sleep"
    """What is maximised (`wakesleep_ext.helmholtz.objectives`): plain or reweighted wake-sleep, or the ELBO, the
    L-sample bound, the same with doubly reparameterised gradients."""
    sleep_weight: float | None = None
    """Part of the sleep phase in the recognition network's gradient; the rest is the reweighted wake phase's. With the
    reweighted objective 0 (known as wake-wake) to 1, 0.5 by default; plain wake-sleep has 1, the baselines 0."""
    defensive_fraction: float = 0.0
    """Probability with which the reweighted wake phase draws z from the prior instead."""
    seed: int = 0
    """Seed of the initial weights and of every draw."""
    epochs: int = 500
    """Passes over the training images."""
    sleep_warm_up: int = 0
    """The first of these epochs, in which there are sleep phases only."""
    batch_size: int = 100
    """Images in a wake phase."""
    num_samples: int = 1
    """Samples of z for each image in the wake phase, L."""
    num_dreams: int | None = None
    """Dreams in a sleep phase; as many as images by default."""
    generative_learning_rate: float = 1e-3
    """Step size of the generative network, which the wake phase trains."""
    recognition_learning_rate: float = 1e-3
    """Step size of the recognition network, which the sleep phase trains."""
    learning_rate_decay: float = 1.0
    """Factor that both step sizes fall by in the course of the run; 1: constant."""
    schedule: Schedule = "exponential"
    """How they fall: at every step, or in stages i = 0, 1, ... of 3^i epochs each, evenly on a logarithmic scale."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's running means of the gradient and of its square."""
    adam_epsilon: float = 1e-4
    """Adam's epsilon."""
    replay: bool = True
    """Record a step and replay it: on a GPU as one CUDA graph, on a CPU as a list of calls of operators. Numbers are
    the same without, but a replay runs no Python: what networks are to do differently later on, they must find in
    tensors. After another change the step is recorded again; networks that have hooks or look at values are called."""

    def __post_init__(self) -> None:
        within = {
            "objective": self.objective in get_args(Objective),
            "sleep_weight": self.sleep_weight is None or 0 <= self.sleep_weight <= 1,
            "defensive_fraction": 0 <= self.defensive_fraction < 1,
            "seed": 0 <= self.seed < 2**63,
            "epochs": self.epochs >= 0,
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
        if self.schedule == "staged" and self.epochs not in (of_stages := [(3**n - 1) // 2 for n in range(1, 20)]):
            raise ValueError(
                f"TrainConfig: expected epochs that make up whole stages ({', '.join(map(str, of_stages[:8]))}, ...) "
                f"with a staged schedule, got {self.epochs}"
            )

    @property
    def stages(self) -> list[int]:
        """At which epoch each stage of a staged schedule begins."""
        starts = [0]
        while (following := 3 * starts[-1] + 1) < self.epochs:
            starts.append(following)
        return starts


RECIPES: dict[Recipe, TrainConfig] = {
    "digits": TrainConfig(),
    "mnist": TrainConfig(epochs=100, learning_rate_decay=0.1),
    "burda": TrainConfig(epochs=3280, batch_size=20, learning_rate_decay=0.1, schedule="staged"),
}
"""Protocols by name, for any objective: the default one; a short one for MNIST; and that of Burda, Grosse &
Salakhutdinov ("Importance weighted autoencoders", ICLR 2016), eight stages, 9.84 million steps on MNIST."""
