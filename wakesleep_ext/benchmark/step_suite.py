"""Define the cases of a whole wake-sleep step: networks, batch sizes, numbers of samples, and implementations.

A step binarises a batch of grey images and trains the generative network on latents inferred from the binary images. It
then trains the recognition network on as many dreams as the batch has images. A shape is `[L, B, D]`: L samples of z
for each of B images, which have D pixels each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from wakesleep_ext.benchmark import step_report
from wakesleep_ext.benchmark.baselines import eager, products, steps, torch_distributions
from wakesleep_ext.benchmark.elsewhere import Elsewhere
from wakesleep_ext.benchmark.instruments import Call, relative_error
from wakesleep_ext.benchmark.measure import Case, Implementation, Labels, Rotation
from wakesleep_ext.benchmark.step_report import NET
from wakesleep_ext.benchmark.suite import TIMES, Suite
from wakesleep_ext.helmholtz.config import ModelConfig
from wakesleep_ext.helmholtz.models import HelmholtzMachine
from wakesleep_ext.training.config import TrainConfig
from wakesleep_ext.training.data import Images
from wakesleep_ext.training.trainer import Trainer

WIDE_NET = (784, 500, 500, 100)
_BATCHES, _NUM_SAMPLES = (20, 100, 1000), (1, 5, 50)

_IMAGES = 2000
_INK = 0.2
"""Fraction of pixels that are not black; 19% in MNIST."""


_STEPS: Mapping[str, Callable[[steps.Problem], steps.Step]] = {
    "eager": lambda problem: steps.by_hand(problem, eager.wake_loss, eager.sleep_loss),
    "distributions": lambda problem: steps.by_hand(
        problem, torch_distributions.wake_loss, torch_distributions.sleep_loss
    ),
    "compiled step": steps.compiled,
    "max-autotune": partial(steps.compiled, mode="max-autotune"),
    "eager in a graph": lambda problem: steps.Captured(_STEPS["eager"](problem)),
    "compiled in a graph": lambda problem: steps.Captured(steps.compiled(problem)),
}
"""The steps in plain PyTorch."""


class Inputs(NamedTuple):
    """The inputs of a step, except the networks. Every implementation creates its own networks."""

    images: Images
    batch: Tensor
    """Indices of the batch's images, int64 `[B]`."""


@dataclass(frozen=True)
class StepCase(Case[Inputs]):
    """A training step in float32. Each call runs the next step on the same batch."""

    block_seconds: ClassVar[float] = 5e-2  # long enough that a step finds its data in cache, as in training

    net: tuple[int, ...]
    """Widths of the recognition network from x to z; the generative network has the same widths in reverse order."""
    batch: int
    num_samples: int
    device: str = "cpu"

    @property
    def candidates(self) -> tuple[str, ...]:
        """Names of the implementations. Tuning takes a minute, so max-autotune is measured in few cases."""
        autotuned = ("max-autotune",) if self in cases(self.device, quick=True) else ()
        in_a_graph = ("eager in a graph", "compiled in a graph") if self.device == "cuda" else ()
        return ("fused", "jax", "eager", "distributions", "compiled step", *autotuned, *in_a_graph, "products")

    @property
    def arithmetic_bound(self) -> bool:
        return True

    @property
    def labels(self) -> Labels:
        return {
            "op": "-".join(map(str, self.net)),
            "pass": "wake+sleep",
            "dtype": "float32",
            "shape": [self.num_samples, self.batch, self.net[0]],
        }

    @property
    def training(self) -> TrainConfig:
        return TrainConfig(batch_size=self.batch, num_samples=self.num_samples)

    @property
    def _parameters(self) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in HelmholtzMachine.from_config(self._model).parameters())

    @property
    def _model(self) -> ModelConfig:
        observed, *hidden, latent = self.net
        return ModelConfig(observed, (latent,), tuple(hidden), tuple(reversed(hidden)))

    @property
    def bytes(self) -> int:
        """Bytes moved: parameters, gradients and the two Adam moments are read and written; the batch is only read."""
        return 8 * torch.float32.itemsize * self._parameters + self.batch * self.net[0]

    @property
    def footprint(self) -> int:
        """Bytes of parameters, gradients, Adam's moments and the batch."""
        return 4 * torch.float32.itemsize * self._parameters + self.batch * self.net[0]

    def inputs(self, device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(1234)
        grey = torch.randint(256, (_IMAGES, self.net[0]), generator=generator)
        grey *= torch.rand(grey.shape, generator=generator) < _INK
        images = Images(grey.to(device, torch.uint8), white=255, shape=(1, self.net[0]))
        return Inputs(images, torch.randperm(_IMAGES, generator=generator)[: self.batch].to(device))

    def machine(self, images: Images) -> HelmholtzMachine:
        """Return new networks. Their initial weights are always the same."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1234)
            machine = HelmholtzMachine.from_config(self._model, images.mean().cpu())
        return machine.to(images.grey.device)

    def implementation(self, candidate: str, inputs: Sequence[Inputs], rotation: Rotation) -> Implementation:
        (one,) = inputs
        return self._jax(one) if candidate == "jax" else super().implementation(candidate, inputs, rotation)

    def calls(self, candidate: str, inputs: Sequence[Inputs]) -> list[Call]:
        return [self._call(candidate, one) for one in inputs]

    def _call(self, candidate: str, inputs: Inputs) -> Call:
        problem = self._problem(inputs)
        if candidate == "fused":
            machine = self.machine(inputs.images)
            return partial(Trainer(machine, inputs.images, self.training).take_step, inputs.batch)
        if candidate == "products":
            multiply = products.of_step(problem.recognition, problem.generative, self.batch, self.num_samples)
            return steps.Captured(multiply) if self.device == "cuda" else multiply
        return _STEPS[candidate](problem)

    def _problem(self, inputs: Inputs) -> steps.Problem:
        """Return new networks in plain PyTorch, and what they train on."""
        machine = self.machine(inputs.images)
        (recognition,), (generative, _) = machine.recognition, machine.generative
        assert isinstance(recognition.network, nn.Sequential)
        assert isinstance(generative.network, nn.Sequential)
        networks = nn.Sequential(*recognition.network), nn.Sequential(*generative.network)
        return steps.Problem(*networks, inputs.images, inputs.batch, self.net[-1], self.training)

    def _jax(self, inputs: Inputs) -> Implementation:
        """Return the step in JAX, in a process with as many threads."""
        if find_spec("jax") is None:
            raise ModuleNotFoundError("JAX is not installed; the extra wakesleep_ext[bench] contains it")
        program = Path(steps.__file__).with_name("jax_step.py")
        environment = {"JAX_PLATFORMS": inputs.batch.device.type, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        return Elsewhere([sys.executable, str(program)], environment, self._problem(inputs).to_bytes())

    def error(self, candidate: str, inputs: Inputs, result: Any) -> float | None:
        """Return the error of the fused losses, compared with the same step in float64, which uses the same keys.

        Return None for other implementations. The baselines' draws cannot be repeated, and the GEMMs compute no loss.
        """
        if candidate != "fused":
            return None
        wide = Trainer(self.machine(inputs.images).double(), inputs.images, self.training)
        return relative_error([result], [wide.take_step(inputs.batch)])


def cases(device: str = "cpu", quick: bool = False) -> list[StepCase]:
    """Return all cases for a device type, `"cpu"` or `"cuda"`. If quick, return two cases of the narrow network."""
    if quick:
        return [StepCase(NET, 20, 1, device), StepCase(NET, 100, 5, device)]
    narrow = [StepCase(NET, batch, samples, device) for batch in _BATCHES for samples in _NUM_SAMPLES]
    return [*narrow, *(StepCase(WIDE_NET, 100, samples, device) for samples in _NUM_SAMPLES)]


SUITE = Suite(
    noun="step",
    cases=cases,
    baselines=step_report.BASELINES,
    sections=step_report.sections,
    headline=list,
    columns={"batch": lambda record: f"{record['shape'][1]:,}", "L": lambda record: str(record["shape"][0])},
    label=lambda record: f"batch {record['shape'][1]:,}\nL = {record['shape'][0]}",
    yardstick=("over its products", step_report.over_products, f"{{:.2f}}{TIMES}"),
    goals=step_report.outcomes,
    goals_are_for={"cpu": "1 or 2 threads of a CPU", "cuda": "an NVIDIA H200"},
    decimals=2,
    notes=step_report.notes,
)
