"""The wake-sleep loop: two phases, two optimizers, and nothing it needs to know of the networks.

Every random draw of a run is a function of the seed and of the step it belongs to, so a run is
repeated by its seed, and continued from nothing more than weights, optimizers and step number.

A step takes nothing from the host: keys and learning rates lie on the device. So it is recorded and replayed, as a CUDA
graph on a GPU, and without Python on a CPU, where a step of few images would take twice as long with it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from wakesleep_ext import ops, random
from wakesleep_ext.helmholtz import objectives
from wakesleep_ext.helmholtz.models import HelmholtzMachine
from wakesleep_ext.helmholtz.objectives import WakeLosses
from wakesleep_ext.replay import Replay, call
from wakesleep_ext.training.data import Images

Objective = Literal["wake-sleep", "reweighted-wake-sleep", "elbo", "iwae", "dreg"]
Schedule = Literal["exponential", "staged"]
Recipe = Literal["digits", "mnist", "burda"]
Network = Literal["generative", "recognition"]

_SLEEP_WEIGHTS: dict[Objective, float] = {
    "wake-sleep": 1.0,
    "reweighted-wake-sleep": 0.5,
    "elbo": 0.0,
    "iwae": 0.0,
    "dreg": 0.0,
}


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
    defensive: float = 0.0
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
            "defensive": 0 <= self.defensive < 1,
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
        if not reweighted and self.sleep_weight not in (None, _SLEEP_WEIGHTS[self.objective]):
            raise ValueError(
                f"TrainConfig: expected sleep_weight {_SLEEP_WEIGHTS[self.objective]:g} with objective "
                f"{self.objective!r}, got {self.sleep_weight}"
            )
        if not reweighted and self.defensive:
            raise ValueError(
                f"TrainConfig: expected defensive 0 with objective {self.objective!r}, got {self.defensive}"
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


class DivergedError(ArithmeticError):
    """A loss is no longer finite; the message names the phase and the step."""


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training images came to."""

    epoch: int
    """Passes completed, this one included."""
    step: int
    """Steps completed."""
    losses: dict[str, float]
    """Means over the steps, in nats: "wake", per image; "wake_phi", per image, of the recognition network in the
    reweighted wake phase; "sleep", per dream. Those that there were."""
    seconds: float
    """Duration."""


class Trainer:
    """Trains a Helmholtz machine on images, both on one device.

    Args:
        machine: its `generative` network is trained in the wake phase, `recognition` in sleep; in the wake phase too,
            if the objective says so.
        images: binarised anew each time they are visited. A last batch that would be smaller than
            the others is left out; which images that concerns changes with every epoch.
        config: how to train.

    Raises:
        ValueError: the objective differentiates through draws, and the latent variables are discrete.
        TypeError: a parameter is in half precision, in which Adam's steps and moments would be lost.
    """

    def __init__(self, machine: HelmholtzMachine, images: Images, config: TrainConfig) -> None:
        self.machine = machine
        self.images = images
        self.config = config
        self.batch_size = min(config.batch_size, len(images))
        self.steps_per_epoch = len(images) // self.batch_size
        self.networks: dict[Network, nn.Module] = {
            "generative": machine.generative,
            "recognition": machine.recognition,
        }
        device = images.grey.device
        for name, parameter in machine.named_parameters():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"Trainer: expected the machine's parameters to be float32 or float64, got {parameter.dtype} for "
                    f"{name}; Adam's small steps are lost in it. Keep them in float32, and run take_step or epochs "
                    f"under torch.autocast to compute in {parameter.dtype}"
                )
        self._dtype = next(machine.parameters()).dtype
        self._steps: dict[Network, Tensor] = {}
        self._one = torch.ones((), device=device)  # to be added; the number 1 would be made into a tensor at every step
        self.optimizers = {name: self._optimizer(name) for name in self.networks}
        self._falls = torch.tensor(config.stages[1:], dtype=torch.float64, device=device) * self.steps_per_epoch
        self._wake_losses = self._objective()
        chosen = config.sleep_weight
        self._sleep_weight = _SLEEP_WEIGHTS[config.objective] if chosen is None else chosen
        self._draws = self._number_draws()
        self._keys = torch.empty(sum(map(len, self._draws.values())), 2, dtype=torch.int64, device=device)
        self._key = self._keys.unbind()
        self._offsets = self._keys[:, 1]
        self._step = torch.zeros((), dtype=torch.int64)  # in a tensor, since no step goes by it
        self.step = 0
        self._run = {awake: Replay(partial(self._train, awake=awake)) for awake in (False, True)}

    def _objective(self) -> Callable[[Tensor, Sequence[Tensor]], WakeLosses]:
        """The losses of the wake phase, of images and the keys of its draws."""
        recognition, generative = self.machine.recognition, self.machine.generative
        config = self.config
        if config.objective == "reweighted-wake-sleep":
            return lambda x, keys: objectives.reweighted_wake_losses(
                recognition, generative, x, config.num_samples, defensive=config.defensive, keys=keys
            )
        loss = {
            "wake-sleep": objectives.wake_theta_loss,
            "elbo": objectives.elbo_loss,
            "iwae": objectives.iwae_loss,
            "dreg": objectives.dreg_loss,
        }[config.objective]
        if config.objective != "wake-sleep":
            objectives.require_rsample(recognition)
        return lambda x, keys: WakeLosses(loss(recognition, generative, x, config.num_samples, keys=keys))

    def _number_draws(self) -> dict[str, range]:
        """The draws of a step, each with a key of its own."""
        layers = len(self.machine.recognition)
        counts = {
            "order": 1,  # of the images; used by the first step of an epoch
            "binarize": 1,
            "wake": 2 * layers + 1 if self.config.defensive else layers,
            "dream": layers + 1,
        }
        draws, first = {}, 0
        for name, count in counts.items():
            draws[name] = range(first, first + count)
            first += count
        return draws

    def _keys_of(self, name: str) -> tuple[Tensor, ...]:
        numbers = self._draws[name]
        return self._key[numbers.start : numbers.stop]

    def _optimizer(self, name: Network) -> torch.optim.Adam:
        """Adam with its state, which it would not make itself before its first step."""
        device = self.images.grey.device
        start = getattr(self.config, f"{name}_learning_rate")
        optimizer = torch.optim.Adam(
            self.networks[name].parameters(),
            # of the type that torch's kernel for the device reads
            lr=torch.tensor(start, dtype=torch.float32 if device.type == "cuda" else torch.float64, device=device),
            betas=self.config.adam_betas,
            eps=self.config.adam_epsilon,
            fused=True,
            capturable=True,
        )
        (group,) = optimizer.param_groups
        steps = torch.zeros(len(group["params"]), device=device)
        for parameter, step in zip(group["params"], steps, strict=True):
            optimizer.state[parameter] = {
                "step": step,
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self._steps[name] = steps
        return optimizer

    @property
    def step(self) -> int:
        """Steps completed; setting it sets the keys of the draws, too."""
        return int(self._step)

    @step.setter
    def step(self, step: int) -> None:
        keys = [random.make_key(self.config.seed, step * len(self._keys) + draw) for draw in range(len(self._keys))]
        self._keys.copy_(torch.stack(keys))
        self._step.fill_(step)

    @property
    def awake(self) -> bool:
        """Whether the next step has a wake phase; the first epochs may have none."""
        return self.step >= self.config.sleep_warm_up * self.steps_per_epoch

    @property
    def _names(self) -> list[str]:
        """Of the losses that a step returns."""
        if not self.awake:
            return ["sleep"]
        both = self.config.objective == "reweighted-wake-sleep" and self._sleep_weight < 1
        return ["wake"] + ["wake_phi"] * both + ["sleep"] * (self._sleep_weight > 0)

    def epochs(self, on_step: Callable[[], object] = lambda: None) -> Iterator[Epoch]:
        """Train to the end of `config.epochs`, pausing after each epoch.

        Args:
            on_step: called after each step.

        Raises:
            DivergedError: a loss or weight became infinite or NaN in the epoch that was to be
                yielded next.
        """
        while self.step < self.config.epochs * self.steps_per_epoch:
            start, names = time.perf_counter(), self._names
            of_steps = []
            for index in self._batches():
                of_steps.append(self.take_step(index))
                on_step()
            losses = torch.stack(of_steps).cpu()
            self._check_finite(names, losses)
            yield Epoch(
                epoch=self.step // self.steps_per_epoch,
                step=self.step,
                losses=dict(zip(names, losses.double().mean(0).tolist(), strict=True)),
                seconds=time.perf_counter() - start,
            )

    def _batches(self) -> tuple[Tensor, ...]:
        # An order from the sort of keyed draws is the same on every device, randperm's is not.
        zeros = torch.zeros(len(self.images), dtype=torch.float64, device=self.images.grey.device)
        (key,) = self._keys_of("order")
        order = ops.gaussian_rsample(zeros, zeros, key=key).argsort()
        return tuple(order.split(self.batch_size)[: self.steps_per_epoch])

    def take_step(self, index: Tensor) -> Tensor:
        """One wake phase on a batch, then one sleep phase; whichever of them the objective has.

        Args:
            index: int64 `[batch_size]`, which images the batch has.

        Returns:
            The losses as :attr:`Epoch.losses` names them, in its order. They are not looked at, since that would stop
            a GPU; :meth:`epochs` does.
        """
        awake = self.awake
        run = self._run[awake] if self.config.replay else partial(call, partial(self._train, awake=awake))
        losses: Tensor = run(index)
        self._step += 1
        return losses

    def _train(self, index: Tensor, *, awake: bool) -> Tensor:
        """The step itself, which may be recorded: what differs from step to step, it takes from tensors."""
        losses, of_wake = [], None
        self._set_learning_rates()
        if awake:
            wake, of_wake = self._wake(index)
            losses += wake
        if not awake or self._sleep_weight > 0:
            losses.append(self._sleep(of_wake))
        elif of_wake is not None:
            self._descend("recognition", of_wake)
        self._offsets.add_(len(self._keys))
        return torch.stack([loss.detach() for loss in losses])

    def _wake(self, index: Tensor) -> tuple[list[Tensor], Sequence[Tensor] | None]:
        """Trains the generative network; returns the losses, and their gradient for the recognition network, if any."""
        (key,) = self._keys_of("binarize")
        x = self.images.binarize(key, index, self._dtype)
        theta, phi = self._wake_losses(x, self._keys_of("wake"))
        wake_weight = 1 - self._sleep_weight
        if not wake_weight:
            self._descend("generative", self._gradients(theta, "generative"))
            return [theta], None
        total = theta if phi is None else theta + wake_weight * phi
        gradients = self._gradients(total, "generative", "recognition")
        count = len(self._trained("generative"))
        self._descend("generative", gradients[:count])
        return [theta] if phi is None else [theta, phi], gradients[count:]

    def _sleep(self, of_wake: Sequence[Tensor] | None) -> Tensor:
        """Trains the recognition network; to the gradient of the wake phase, if there is one, comes that of dreams."""
        loss = objectives.sleep_phi_loss(
            self.machine.recognition,
            self.machine.generative,
            self.config.num_dreams or self.batch_size,
            keys=self._keys_of("dream"),
        )
        if of_wake is None:
            self._descend("recognition", self._gradients(loss, "recognition"))
        else:
            gradients = self._gradients(self._sleep_weight * loss, "recognition")
            self._descend("recognition", [a + b for a, b in zip(gradients, of_wake, strict=True)])
        return loss

    def _set_learning_rates(self) -> None:
        """To what they have fallen to at this step."""
        config = self.config
        if config.learning_rate_decay == 1:
            return
        step = self._offsets[0].double() / len(self._keys)
        if config.schedule == "exponential":
            part = step / (config.epochs * self.steps_per_epoch)
        else:
            part = (step >= self._falls).double().sum() / max(1, len(self._falls))
        for name, optimizer in self.optimizers.items():
            (group,) = optimizer.param_groups
            group["lr"].copy_(getattr(config, f"{name}_learning_rate") * config.learning_rate_decay**part)

    def _trained(self, network: Network) -> list[Tensor]:
        """The parameters of a network that are not frozen.

        Where others have taken their places, as `load_state_dict(assign=True)` has it, the optimizer's state is theirs.
        """
        optimizer, parameters = self.optimizers[network], list(self.networks[network].parameters())
        (group,) = optimizer.param_groups
        for number, (old, new) in enumerate(zip(group["params"], parameters, strict=True)):
            if old is not new:
                group["params"][number] = new
                optimizer.state[new] = optimizer.state.pop(old)
        return [parameter for parameter in parameters if parameter.requires_grad]

    def _gradients(self, loss: Tensor, *networks: Network) -> tuple[Tensor, ...]:
        """Those that others may have left in .grad do not enter."""
        parameters = [parameter for name in networks for parameter in self._trained(name)]
        return torch.autograd.grad(loss, parameters) if parameters else ()

    def _descend(self, network: Network, gradients: Sequence[Tensor]) -> None:
        optimizer, trained = self.optimizers[network], self._trained(network)
        if not trained:
            return
        (group,) = optimizer.param_groups
        states = [optimizer.state[parameter] for parameter in trained]
        exp_avgs, exp_avg_sqs = ([state[slot] for state in states] for slot in ("exp_avg", "exp_avg_sq"))
        beta1, beta2 = group["betas"]
        with torch.no_grad():
            self._steps[network].add_(self._one)
            step = states[0]["step"]  # the same for all
            ops.adam_(trained, gradients, exp_avgs, exp_avg_sqs, step, group["lr"], beta1, beta2, group["eps"])

    def _check_finite(self, names: Sequence[str], losses: Tensor) -> None:
        """Losses `[steps, names]` of the epoch; read once an epoch, for each look stops a GPU."""
        for row, column in (~losses.isfinite()).nonzero().tolist():
            step = self.step - len(losses) + row + 1
            raise DivergedError(
                f"the {names[column]} loss became {losses[row, column].item()} at step {step} "
                f"(epoch {self.step // self.steps_per_epoch})"
            )
        for name, network in self.networks.items():
            if not all(parameter.isfinite().all() for parameter in network.parameters()):
                raise DivergedError(f"a weight of the {name} network became infinite at step {self.step}")

    def state_dict(self) -> dict[str, Tensor]:
        """Weights and optimizer state by name, `machine.…`, `optimizer.generative.…`; not copies.

        With `step`, all that continuing a run takes.
        """
        tensors = {f"machine.{name}": value for name, value in self.machine.state_dict().items()}
        for of, network in self.networks.items():
            for name, parameter in network.named_parameters():
                for slot, value in self.optimizers[of].state[parameter].items():
                    tensors[f"optimizer.{of}.{name}.{slot}"] = value
        return tensors

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over, in place, what :meth:`state_dict` gave. `step` is to be set, too.

        Raises:
            KeyError: a tensor is missing; nothing has been changed.
        """
        own = self.state_dict()
        found = {name: tensors[name] for name in own}
        for name, tensor in own.items():
            tensor.copy_(found[name])
