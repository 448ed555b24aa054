"""Define the cases of a whole wake-sleep step: networks, batch sizes, numbers of samples, and implementations.

A step binarises a batch of grey images and trains the generative network on latents inferred from the binary images. It
then trains the recognition network on as many dreams as the batch has images. A shape is `[L, B, D]`: L samples of z
for each of B images, which have D pixels each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from wakesleep_ext.benchmark.baselines import eager, torch_distributions
from wakesleep_ext.benchmark.measure import Call, Case, Labels, relative_error
from wakesleep_ext.benchmark.result import Record, Result, Row, ratio, rows
from wakesleep_ext.benchmark.suite import NONE, TIMES, Outcome, Section, Suite
from wakesleep_ext.helmholtz.config import ModelConfig
from wakesleep_ext.helmholtz.models import HelmholtzMachine
from wakesleep_ext.training.config import TrainConfig
from wakesleep_ext.training.data import Images
from wakesleep_ext.training.trainer import Trainer

_Loss = Callable[..., Tensor]

NET = (784, 200, 200, 50)
WIDE_NET = (784, 500, 500, 100)
_BATCHES, _NUM_SAMPLES = (20, 100, 1000), (1, 5, 50)

_IMAGES = 2000
_INK = 0.2
"""Fraction of pixels that are not black; 19% in MNIST."""


class Inputs(NamedTuple):
    """The inputs of a step, except the networks. Every implementation creates its own networks."""

    images: Images
    batch: Tensor
    """Indices of the batch's images, int64 `[B]`."""


@dataclass(frozen=True)
class StepCase(Case[Inputs]):
    """A training step in float32. Each call runs the next step on the same batch."""

    candidates: ClassVar[tuple[str, ...]] = ("fused", "eager", "distributions", "compile", "products")
    arithmetic_bound: ClassVar[bool] = True
    block_seconds: ClassVar[float] = 5e-2  # long enough that a step finds its data in cache, as in training

    net: tuple[int, ...]
    """Widths of the recognition network from x to z; the generative network has the same widths in reverse order."""
    batch: int
    num_samples: int

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

    def calls(self, candidate: str, inputs: Sequence[Inputs]) -> list[Call]:
        return [self._call(candidate, one) for one in inputs]

    def _call(self, candidate: str, inputs: Inputs) -> Call:
        machine = self.machine(inputs.images)
        if candidate == "fused":
            return partial(Trainer(machine, inputs.images, self.training).take_step, inputs.batch)
        if candidate == "products":
            return _products(machine, self.batch, self.num_samples)
        return self._by_hand(machine, inputs, *_losses(candidate))

    def _by_hand(self, machine: HelmholtzMachine, inputs: Inputs, wake_loss: _Loss, sleep_loss: _Loss) -> Call:
        """Return a training step with these two losses, written in plain PyTorch."""
        recognition, generative = (nn.Sequential(*network) for network in _networks(machine))
        wake, sleep = (_adam(network, self.training) for network in (generative, recognition))
        (images, batch), latent = inputs, self.net[-1]

        def take_step() -> Tensor:
            x = torch.bernoulli(images.grey.index_select(0, batch) / images.white)
            losses = (
                _descend(wake, wake_loss(recognition, generative, x, self.num_samples)),
                _descend(sleep, sleep_loss(recognition, generative, self.batch, latent)),
            )
            return torch.stack(losses)

        return take_step

    def error(self, candidate: str, inputs: Inputs, result: Any) -> float | None:
        """Return the error of the fused losses, compared with the same step in float64, which uses the same keys.

        Return None for other implementations. The baselines' draws cannot be repeated, and the GEMMs compute no loss.
        """
        if candidate != "fused":
            return None
        wide = Trainer(self.machine(inputs.images).double(), inputs.images, self.training)
        return relative_error([result], [wide.take_step(inputs.batch)])


@dataclass(frozen=True)
class CudaStepCase(StepCase):
    """A training step on a GPU, where `compile` is also measured with CUDA graphs."""

    candidates: ClassVar[tuple[str, ...]] = (*StepCase.candidates[:-1], "compile with graphs", "products")


def cases(device: str = "cpu", quick: bool = False) -> list[StepCase]:
    """Return all cases for a device type, `"cpu"` or `"cuda"`. If quick, return two cases of the narrow network."""
    return list(_cases(CudaStepCase if device == "cuda" else StepCase, quick))


def _cases(case: type[StepCase], quick: bool) -> Iterator[StepCase]:
    if quick:
        yield case(NET, 20, 1)
        yield case(NET, 100, 5)
        return
    for batch in _BATCHES:
        for num_samples in _NUM_SAMPLES:
            yield case(NET, batch, num_samples)
    for num_samples in _NUM_SAMPLES:
        yield case(WIDE_NET, 100, num_samples)


def _losses(candidate: str) -> tuple[_Loss, _Loss]:
    """Return an implementation's wake loss and sleep loss."""
    if candidate == "distributions":
        return torch_distributions.wake_loss, torch_distributions.sleep_loss
    if candidate == "eager":
        return eager.wake_loss, eager.sleep_loss
    torch.compiler.reset()  # otherwise later shapes would reach the recompilation limit and run uncompiled
    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    if candidate == "compile with graphs":
        with_graphs = partial(compiled, mode="reduce-overhead")
        return _copied(with_graphs(eager.wake_loss)), _copied(with_graphs(eager.sleep_loss))
    # the thread count in the options keeps torch from reusing cached code compiled for another number of threads
    on_threads = partial(compiled, options={"cpp.threads": torch.get_num_threads()})
    return on_threads(eager.wake_loss), on_threads(eager.sleep_loss)


def _copied(loss: _Loss) -> _Loss:
    """Return a function that copies the loss, since the next replay of the CUDA graph overwrites it."""
    return lambda *arguments: loss(*arguments).clone()


def _adam(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    rate, betas, epsilon = config.generative_learning_rate, config.adam_betas, config.adam_epsilon
    return torch.optim.Adam(network.parameters(), rate, betas, epsilon, fused=True)


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def _networks(machine: HelmholtzMachine) -> tuple[nn.Sequential, nn.Sequential]:
    """Return the networks from x to the packed parameters of z, and from z to the logits of x."""
    (recognition,), (generative, _) = machine.recognition, machine.generative
    assert isinstance(recognition.network, nn.Sequential)
    assert isinstance(generative.network, nn.Sequential)
    return recognition.network, generative.network


def _products(machine: HelmholtzMachine, batch: int, num_samples: int) -> Call:
    """Return a call that runs the GEMMs of a step with `torch.mm`, and nothing else."""
    recognition, generative = _networks(machine)
    passes = (
        _Products(recognition, batch, backward=False),
        _Products(generative, num_samples * batch, backward=True),
        _Products(generative, batch, backward=False),
        _Products(recognition, batch, backward=True),
    )

    def multiply() -> None:
        for products in passes:
            products.forward()
            products.backward()

    return multiply


class _Products:
    """Runs the GEMMs of one network on a number of rows, and writes the results to preallocated memory."""

    def __init__(self, network: nn.Sequential, rows: int, backward: bool) -> None:
        self.weights = [layer.weight.detach() for layer in network if isinstance(layer, nn.Linear)]
        like = self.weights[0]
        widths = [like.shape[1], *(len(weight) for weight in self.weights)]
        self.layers = [like.new_empty(rows, width).normal_() for width in widths]
        self.gradients = [torch.randn_like(layer) for layer in self.layers] if backward else []
        self.weight_gradients = [torch.empty_like(weight) for weight in self.weights] if backward else []

    def forward(self) -> None:
        for weight, (below, above) in zip(self.weights, pairwise(self.layers), strict=True):
            torch.mm(below, weight.t(), out=above)

    def backward(self) -> None:
        """Run the GEMMs of the backward pass, except the one for the gradient of the input, which is not needed."""
        for number in reversed(range(len(self.weight_gradients))):
            above = self.gradients[number + 1]
            torch.mm(above.t(), self.layers[number], out=self.weight_gradients[number])
            if number:
                torch.mm(above, self.weights[number], out=self.gradients[number])


# ---- results ---------------------------------------------------------------------------------------------------------

_Narrow: TypeAlias = "dict[tuple[int, int], Row]"

BURDA_STEPS = 9_840_000
"""Number of steps in the protocol of Burda, Grosse & Salakhutdinov ("Importance weighted autoencoders", ICLR 2016).
The batch size is 20, L = 1, and training makes 3,280 passes over 60,000 images."""

_AT_MOST = {
    # on a CPU, keyed by (batch, L) of the narrow network: the maximum ratio of the step time to the time of the GEMMs
    # alone, and a stricter goal
    (20, 1): (1.6, None),
    (100, 5): (1.35, 1.25),
    (100, 50): (1.35, 1.25),
}


_AT_LEAST = {"eager": 5, "compile": 2, "compile with graphs": 1}
"""On a GPU, the minimum speedup over each baseline at every batch size up to 256."""
_MOST_KERNELS = 39
"""Maximum number of kernels in a step with batch size 20 and L = 1. The optimizers launch four of them."""
_PROTOCOL_MINUTES = 20


def sections(records: Iterable[Record]) -> list[Section]:
    """Group the cases by network."""
    nets: dict[str, list[Row]] = {}
    for row in rows(records):
        nets.setdefault(_some(row)["op"], []).append(row)
    return [(f"A step of {net}:", part) for net, part in nets.items()]


def outcomes(result: Result) -> list[Outcome]:
    """Check the goals for the device. All of them are for the narrow network."""
    narrow = _narrow(rows(result["records"]))
    return _on_a_gpu(narrow) if result["machine"]["device"] == "cuda" else _on_a_cpu(narrow)


def _on_a_cpu(narrow: _Narrow) -> list[Outcome]:
    found = []
    for (batch, num_samples), (wanted, better) in _AT_MOST.items():
        row = narrow.get((batch, num_samples))
        measured = _over_products(row) if row else None
        cells = {
            "batch": str(batch),
            "L": str(num_samples),
            "measured": NONE if measured is None else f"{measured:.2f}{TIMES} its products",
            "goal": f"≤ {wanted:g}{TIMES}" + (f", better {better:g}{TIMES}" if better else ""),
        }
        found.append(Outcome(cells, None if measured is None else measured <= wanted))
    return found


def _on_a_gpu(narrow: _Narrow) -> list[Outcome]:
    def outcome(what: str, measured: float | None, unit: str, *, at_least: float = 0, at_most: float = 0) -> Outcome:
        cells = {
            "what": what,
            "measured": NONE if measured is None else f"{measured:.{1 if at_least else 0}f}{unit}",
            "goal": f"≥ {at_least:g}{unit}" if at_least else f"≤ {at_most:g}{unit}",
        }
        return Outcome(cells, None if measured is None else measured >= at_least if at_least else measured <= at_most)

    found = []
    for baseline, wanted in _AT_LEAST.items():
        ratios = [ratio(row, baseline) for (batch, _), row in narrow.items() if batch <= 256]
        least = min((measured for measured in ratios if measured is not None), default=None)
        found.append(outcome(f"speed versus {baseline}, batches of 256 or less", least, TIMES, at_least=wanted))
    fused = narrow.get((20, 1), {}).get("fused")
    kernels, minutes = (fused.get("launches"), fused["median_us"] * BURDA_STEPS / 60e6) if fused else (None, None)
    found.append(outcome("kernels of a step, batch 20, L = 1", kernels, "", at_most=_MOST_KERNELS))
    found.append(outcome("the whole of Burda's protocol", minutes, " min", at_most=_PROTOCOL_MINUTES))
    return found


def notes(cases: Sequence[Row]) -> list[str]:
    """Say how long each implementation would take for the whole protocol of Burda et al."""
    row = _narrow(cases).get((20, 1))
    if row is None:
        return []
    times = [f"{name} {_duration(1e-6 * BURDA_STEPS * record['median_us'])}" for name, record in row.items()]
    protocol = f"the whole of Burda's protocol, {BURDA_STEPS / 1e6:.2f} million steps of batch 20 with L = 1"
    return [f"At this rate {protocol}, takes: {', '.join(times)}."]


def _narrow(cases: Iterable[Row]) -> _Narrow:
    """Return the cases of the narrow network, by batch size and L."""
    labels = StepCase(NET, 1, 1).labels
    of_net = [(record["shape"], row) for row in cases if (record := _some(row))["op"] == labels["op"]]
    return {(batch, num_samples): row for (num_samples, batch, _), row in of_net}


def _over_products(row: Row) -> float | None:
    """Return our step time divided by the time of the GEMMs alone."""
    found = ratio(row, "products")
    return None if found is None else 1 / found


def _some(row: Row) -> Record:
    return next(iter(row.values()))


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


_BASELINES = tuple(name for name in CudaStepCase.candidates if name not in ("fused", "products"))

SUITE = Suite(
    noun="step",
    cases=cases,
    baselines=_BASELINES,
    sections=sections,
    headline=list,
    columns={"batch": lambda record: f"{record['shape'][1]:,}", "L": lambda record: str(record["shape"][0])},
    label=lambda record: f"batch {record['shape'][1]:,}\nL = {record['shape'][0]}",
    yardstick=("over its products", _over_products, f"{{:.2f}}{TIMES}"),
    goals=outcomes,
    goals_are_for={"cpu": "1 or 2 threads of a CPU", "cuda": "an NVIDIA H200"},
    decimals=2,
    notes=notes,
)
