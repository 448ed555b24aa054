"""Write a whole training step in plain PyTorch: binarise a batch, compute both losses, and update both networks.

A step runs op by op, compiled into one graph with its optimizers, or captured in one CUDA graph.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._inductor import list_mode_options
from torch.func import functional_call, grad_and_value
from torch.optim.adam import Adam, adam

from wakesleep_ext.benchmark.baselines import eager
from wakesleep_ext.training.config import TrainConfig
from wakesleep_ext.training.data import Images

T = TypeVar("T")
Step = Callable[[], Tensor]
"""Takes a training step, and returns the losses of the wake phase and the sleep phase, `[2]`."""
Loss = Callable[..., Tensor]


class Problem(NamedTuple):
    """What a step trains, and on what."""

    recognition: nn.Sequential
    """Maps x to the packed parameters of z."""
    generative: nn.Sequential
    """Maps z to the logits of x."""
    images: Images
    batch: Tensor
    """Indices of the images in the batch, int64 `[B]`."""
    latent: int
    """Number of latent variables."""
    config: TrainConfig

    def to_bytes(self) -> bytes:
        """Return the problem as the arrays that `jax_step.py` reads."""
        beta1, beta2 = self.config.adam_betas
        arrays: dict[str, Any] = {
            "grey": self.images.grey.numpy(force=True),
            "white": self.images.white,
            "batch": self.batch.numpy(force=True),
            "num_samples": self.config.num_samples,
            "seed": self.config.seed,
            "learning_rate": self.config.generative_learning_rate,
            "beta1": beta1,
            "beta2": beta2,
            "epsilon": self.config.adam_epsilon,
            "threads": torch.get_num_threads(),
        }
        for name, network in (("recognition", self.recognition), ("generative", self.generative)):
            for number, parameter in enumerate(network.parameters()):
                arrays[f"{name}.{number}"] = parameter.t().numpy(force=True)
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()

    def binarize(self) -> Tensor:
        return torch.bernoulli(self.images.grey.index_select(0, self.batch) / self.images.white)


def by_hand(problem: Problem, wake_loss: Loss, sleep_loss: Loss) -> Step:
    """Return a step with these two losses that runs op by op, with torch's fused Adam."""
    recognition, generative, config = problem.recognition, problem.generative, problem.config
    wake, sleep = (_optimizer(network, config) for network in (generative, recognition))

    def take_step() -> Tensor:
        x = problem.binarize()
        losses = (
            _descend(wake, wake_loss(recognition, generative, x, config.num_samples)),
            _descend(sleep, sleep_loss(recognition, generative, len(x), problem.latent)),
        )
        return torch.stack(losses)

    return take_step


def compiled(problem: Problem, mode: str = "default") -> Step:
    """Return the step of :func:`eager.wake_loss` and :func:`eager.sleep_loss`, compiled with its optimizers.

    Args:
        problem: what the step trains.
        mode: a mode of `torch.compile`, such as "max-autotune".
    """
    recognition, generative, config = problem.recognition, problem.generative, problem.config
    wake, sleep = _FunctionalAdam(generative, config), _FunctionalAdam(recognition, config)

    def take_step() -> Tensor:
        x = problem.binarize()
        losses = (
            wake.descend(lambda network: eager.wake_loss(recognition, network, x, config.num_samples)),
            sleep.descend(lambda network: eager.sleep_loss(network, generative, len(x), problem.latent)),
        )
        return torch.stack(losses)

    torch.compiler.reset()  # otherwise later shapes would reach the recompilation limit and run uncompiled
    # the thread count in the options keeps torch from reusing cached code compiled for another number of threads
    options = {**list_mode_options(mode), "cpp.threads": torch.get_num_threads()}
    step: Step = torch.compile(take_step, fullgraph=True, dynamic=False, options=options)
    return step


class Captured(Generic[T]):
    """A step that replays a CUDA graph of another step, and overwrites the result of the previous replay.

    It keeps the other step, since the graph reads the memory of that step's tensors.
    """

    def __init__(self, step: Callable[[], T]) -> None:
        self._step, self._graph = step, torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph):
            self._result = step()

    def __call__(self) -> T:
        self._graph.replay()
        return self._result


def _optimizer(network: nn.Module, config: TrainConfig) -> Adam:
    return Adam(
        network.parameters(),
        config.generative_learning_rate,
        config.adam_betas,
        config.adam_epsilon,
        fused=True,
        capturable=next(network.parameters()).is_cuda,
    )


def _descend(optimizer: Adam, loss: Tensor) -> Tensor:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


class _FunctionalAdam:
    """Adam on the parameters of a network, written so that one graph can hold the gradients and the update."""

    def __init__(self, network: nn.Module, config: TrainConfig) -> None:
        self.network, self.config = network.requires_grad_(False), config  # grad_and_value alone differentiates
        named = dict(network.named_parameters())
        self.names = list(named)
        self.parameters: list[Tensor] = list(named.values())
        self.exp_avgs, self.exp_avg_sqs = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.steps = [p.new_zeros(()) for p in self.parameters]
        for tensor in (*self.parameters, *self.exp_avgs, *self.exp_avg_sqs, *self.steps):
            torch._dynamo.mark_static_address(tensor)  # otherwise CUDA graphs would reject the update in place

    def descend(self, loss_of: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> Tensor:
        """Take a step on a loss, given as a function of the network, and return the loss."""

        def loss_at(parameters: Sequence[Tensor]) -> Tensor:
            return loss_of(lambda h: functional_call(self.network, dict(zip(self.names, parameters, strict=True)), h))

        gradients, loss = grad_and_value(loss_at)(self.parameters)
        beta1, beta2 = self.config.adam_betas
        with torch.no_grad():
            adam(
                self.parameters,
                gradients,
                self.exp_avgs,
                self.exp_avg_sqs,
                [],
                self.steps,
                foreach=False,  # compiles faster than foreach, to the same kernels
                capturable=True,  # the step count is a tensor, so that a new count does not recompile
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=self.config.generative_learning_rate,
                weight_decay=0.0,
                eps=self.config.adam_epsilon,
                maximize=False,
            )
        return loss
