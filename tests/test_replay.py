"""A step as a graph. Only a GPU has graphs, see test_cuda.py; here recordings of what is called stand in for them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from test_training import make_trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wakesleep_ext import training
from wakesleep_ext.replay import Replay
from wakesleep_ext.training import Trainer


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Recording(TorchDispatchMode):
    """What is called while it is on, to be called again on the same memory. As a graph, it knows of no Python: numbers
    stay as they were; and what it records does not happen."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.overwritten: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[number] if number < len(args) else kwargs.get(argument.name)
                self.overwritten += [(tensor, tensor.clone()) for tensor in tensors(written)]
        results = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, results))
        return results

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        with torch.no_grad():
            for tensor, value in reversed(self.overwritten):
                tensor.copy_(value)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, results in self.calls:
            for held, value in zip(tensors(results), tensors(func(*args, **kwargs)), strict=True):
                if held.data_ptr() != value.data_ptr():  # neither a view nor an argument
                    held.copy_(value)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """Those that are captured; on the CPU, too, in this test."""
    captured: list[Recording] = []

    def graph(recording: Recording) -> Recording:
        captured.append(recording)
        return recording

    monkeypatch.setattr(training, "_DEVICES_WITH_GRAPHS", ("cpu",))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return captured


# ---- any function ----------------------------------------------------------------------------------------------------


class RunningSum:
    """Of what it is called with."""

    def __init__(self) -> None:
        self.total = torch.zeros(3)
        self.calls = 0

    def add(self, values: Tensor) -> Tensor:
        self.calls += 1
        return self.total.add_(values) * 2

    def replay(self) -> Replay:
        return Replay(self.add, lambda: [self.total])


def test_a_replay_does_what_the_function_does(graphs: list[Recording]) -> None:
    running, values = RunningSum(), torch.arange(12.0).view(4, 3)
    replay = running.replay()
    results = torch.stack([replay(row) for row in values])  # each keeps its own
    assert torch.equal(results, 2 * values.cumsum(0))
    assert torch.equal(running.total, values.sum(0))
    assert len(graphs) == 1
    assert running.calls == 4  # three to warm up, one to be captured; Python runs no more


def test_other_arguments_than_those_captured_are_refused(graphs: list[Recording]) -> None:
    running = RunningSum()
    replay = running.replay()
    replay(torch.ones(3))
    for wrong, got in ((torch.ones(1), r"torch\.float32 \[1\]"), (torch.ones(3).long(), r"torch\.int64 \[3\]")):
        with pytest.raises(ValueError, match=rf"as it was captured, torch\.float32 \[3\], got {got}"):
            replay(wrong)
    assert torch.equal(running.total, torch.ones(3))


def test_a_warm_up_that_fails_leaves_no_trace(graphs: list[Recording]) -> None:
    running = RunningSum()

    def fail(values: Tensor) -> Tensor:
        running.add(values)
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        Replay(fail, lambda: [running.total])(torch.ones(3))
    assert not graphs
    assert torch.equal(running.total, torch.zeros(3))


# ---- training --------------------------------------------------------------------------------------------------------

STEPS = 200


def losses(trainer: Trainer) -> list[dict[str, float]]:
    return [epoch.losses for epoch in trainer.epochs()]


def make(cuda_graph: bool, **config: Any) -> Trainer:
    trainer: Trainer = make_trainer(**{"cuda_graph": cuda_graph, "epochs": STEPS // 4, "num_samples": 2, **config})
    return trainer


def assert_same_state(one: Trainer, other: Trainer) -> None:
    state, same = one.state_dict(), other.state_dict()
    assert state.keys() == same.keys()
    assert all(torch.equal(state[name], same[name]) for name in state)
    assert one.step == other.step
    assert torch.equal(one._keys, other._keys)


@pytest.mark.parametrize(
    ("config", "captured"),
    [
        ({}, 1),
        ({"learning_rate_decay": 0.01}, 1),
        ({"objective": "reweighted-wake-sleep", "defensive": 0.1}, 1),
        ({"objective": "dreg"}, 1),
        ({"objective": "iwae", "sleep_warm_up": 20}, 2),
    ],
    ids=str,
)
def test_replayed_steps_are_those_of_the_eager_path(
    graphs: list[Recording], config: dict[str, Any], captured: int
) -> None:
    eager, replayed = (make(cuda_graph, **config) for cuda_graph in (False, True))
    assert losses(eager) == losses(replayed)
    assert_same_state(eager, replayed)
    assert eager.step == STEPS
    assert len(graphs) == captured


@pytest.mark.parametrize("schedule", ["exponential", "staged"])
def test_decay_on_the_device_is_that_on_the_host(monkeypatch: pytest.MonkeyPatch, schedule: str) -> None:
    config = {"learning_rate_decay": 0.01, "schedule": schedule, "epochs": 40}
    on_host = make(cuda_graph=True, **config)
    monkeypatch.setattr(training, "_DEVICES_WITH_GRAPHS", ("cpu",))
    on_device = make(cuda_graph=False, **config)
    for trainer in (on_host, on_device):
        list(trainer.epochs())
    rates = [trainer.optimizers["generative"].param_groups[0]["lr"] for trainer in (on_host, on_device)]
    assert isinstance(rates[0], float)
    assert isinstance(rates[1], Tensor)
    assert rates[1].item() == pytest.approx(rates[0], rel=1e-6)
    assert rates[0] == pytest.approx(1e-5, rel=0.05)


def test_what_is_loaded_between_replays_is_trained_on(graphs: list[Recording]) -> None:
    replayed, other = make(cuda_graph=True, learning_rate_decay=0.5), make(cuda_graph=False, learning_rate_decay=0.5)
    for trainer, number in ((replayed, 3), (other, 5)):
        for _ in range(number):
            next(trainer.epochs())
    replayed.load_state_dict(other.state_dict())
    replayed.step = other.step
    assert losses(replayed) == losses(other)
    assert_same_state(replayed, other)
    assert len(graphs) == 1
