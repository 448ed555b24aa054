"""Test replays on a CPU, and with a stand-in for CUDA graphs. test_cuda.py tests real ones, which need a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import count, cycle, islice
from typing import Any
from unittest.mock import MagicMock

import imported_by_test_replay
import numpy
import pytest
import torch
from cases import thorough
from test_training import make_trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

import wakesleep_ext as ws
from wakesleep_ext import _C, replay
from wakesleep_ext.benchmark.instruments import peak_bytes
from wakesleep_ext.helmholtz.config import ModelConfig
from wakesleep_ext.replay import Replay
from wakesleep_ext.training.data import Images
from wakesleep_ext.training.trainer import Trainer


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Graph(TorchDispatchMode):
    """A stand-in for a CUDA graph, which records calls and repeats them on the same memory. Like a graph, it ignores
    Python: numbers stay as recorded, and calls have no effect while they are captured.
    """

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


@pytest.fixture(params=["recording", "graph"])
def recorded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The recordings made: lists of operator calls, as on a CPU, or stand-ins for CUDA graphs."""
    made: list[Any] = []
    record = {"recording": replay._repeat, "graph": replay._capture}[request.param]

    def note(*arguments: Any) -> Any:
        recorded = record(*arguments)
        made.append(recorded[0])
        return recorded

    monkeypatch.setattr(replay, "_RECORD_ON", {"cpu": note})
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph)
    monkeypatch.setattr(torch.cuda, "Stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return made


def recorded_by(replayed: Replay, *arguments: Tensor) -> Replay:
    """Return the replay after the two calls that a recording takes."""
    for _ in range(2):
        replayed(*arguments)
    return replayed


# ---- any function ----------------------------------------------------------------------------------------------------


class RunningSum:
    """Sums its arguments over calls."""

    def __init__(self) -> None:
        self.total = torch.zeros(3)
        self.calls = count()

    def add(self, values: Tensor) -> Tensor:
        next(self.calls)
        return self.total.add_(values) * 2

    def replay(self) -> Replay:
        return Replay(self.add)


def test_a_replay_does_what_the_function_does(recorded: list[Any]) -> None:
    running, values = RunningSum(), torch.arange(12.0).view(4, 3)
    add = running.replay()
    results = torch.stack([add(row) for row in values])  # each keeps its own
    assert torch.equal(results, 2 * values.cumsum(0))
    assert torch.equal(running.total, values.sum(0))
    assert len(recorded) == 1
    is_captured = isinstance(recorded[0], replay._Captured)
    assert next(running.calls) == 1 + (6 if is_captured else 3)  # one call, those that record, and none at all


@pytest.mark.parametrize(
    "result",
    [lambda x, state: x, lambda x, state: x[1:], lambda x, state: state, lambda x, state: state.add_(x)[1:]],
    ids=["an argument", "a part of one", "state", "a part of it"],
)
def test_every_result_is_a_tensor_of_its_own(recorded: list[Any], result: Callable[[Tensor, Tensor], Tensor]) -> None:
    state, values = torch.zeros(3), torch.arange(9.0).view(3, 3)
    replayed = recorded_by(Replay(lambda x: result(x, state)), values[0])
    state.zero_()
    found = [replayed(x) for x in values]
    state.zero_()
    expected = [result(x, state).clone() for x in values]
    values.zero_()
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert len(recorded) == 1


def test_other_arguments_than_those_recorded_are_refused(recorded: list[Any]) -> None:
    running = RunningSum()
    add = running.replay()
    add(torch.ones(3))
    for wrong, got in ((torch.ones(1), r"torch\.float32 \[1\]"), (torch.ones(3).long(), r"torch\.int64 \[3\]")):
        with pytest.raises(ValueError, match=rf"as in the first call, torch\.float32 \[3\] on cpu, got {got}"):
            add(wrong)
    assert torch.equal(running.total, torch.ones(3))


def test_a_recording_that_fails_leaves_no_trace(recorded: list[Any]) -> None:
    running, calls = RunningSum(), count()

    def fail(values: Tensor) -> Tensor:
        result = running.add(values)
        if next(calls) == 1:
            raise ArithmeticError
        return result

    replayed = Replay(fail)
    for number in (1, 2):
        assert torch.equal(replayed(torch.ones(3)), torch.full((3,), 2.0 * number))
    assert not recorded
    assert replayed.reason == "it fails while its calls are recorded: ArithmeticError()"
    assert torch.equal(running.total, torch.full((3,), 2.0))


# ---- on a CPU --------------------------------------------------------------------------------------------------------


def in_lists(x: Tensor) -> Tensor:
    first, *rest = x.clone().split(2)
    torch._foreach_mul_(rest, 2.0)
    return torch.cat([first.sin(), *torch._foreach_add(rest, [first, first])])


def by_index(x: Tensor) -> Tensor:
    rows, columns = x.new_tensor([0, 1], dtype=torch.long), x.argsort()[:2]
    return x.view(1, 6).repeat(2, 1).index_put_((rows, columns), x[:2] * 2, accumulate=True)


def with_gradient(x: Tensor) -> Tensor:
    weight = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((weight.sin() * weight).sum() * 3, weight)
    return gradient


def in_half(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return x.view(2, 3) @ x.view(3, 2)


def with_noise(x: Tensor) -> Tensor:
    return x + torch.rand_like(x) + torch.nn.functional.dropout(x)


def of_an_mlp(x: Tensor) -> Tensor:
    layer = torch.arange(12.0).view(2, 6).sin()
    return ws.linear_bernoulli_log_prob_sum(x[None], layer, None, torch.ones(1, 2)).exp() + with_gradient(x)


@pytest.mark.parametrize(
    "function", [in_lists, by_index, with_gradient, in_half, with_noise, of_an_mlp], ids=lambda f: f.__name__
)
def test_operators_of_every_kind_are_repeated(function: Callable[[Tensor], Tensor]) -> None:
    values = torch.randn(5, 6)
    replayed = recorded_by(Replay(function), values[0])
    assert replayed.is_replayed
    for row in values:
        torch.manual_seed(0)
        expected = function(row.clone())
        torch.manual_seed(0)
        before = row.clone()
        assert torch.equal(replayed(row), expected)
        assert torch.equal(row, before)


def looks_at_values(x: Tensor) -> Tensor:
    return x.sin() if x.sum() > 0 else x.cos()


def has_as_many_as_it_finds(x: Tensor) -> Tensor:
    return x[x > 0].sum() + x.nonzero().sum()


def counts(x: Tensor, calls: list[int] = []) -> Tensor:  # noqa: B006
    calls.append(1)
    return x * len(calls)


def counts_unseen(x: Tensor, calls: Iterator[int] = count()) -> Tensor:  # noqa: B008
    return x * next(calls)


def as_numpy(x: Tensor) -> Tensor:
    return x * float(x.numpy()[0])


def as_list(x: Tensor) -> Tensor:
    return x * x.tolist()[0]


def by_dlpack(x: Tensor) -> Tensor:
    return x * float(numpy.from_dlpack(x.clone())[0])


def of_another_file(x: Tensor) -> Tensor:
    return x * imported_by_test_replay.scale()


def is_not_to_be_watched(x: Tensor) -> Tensor:
    if _get_current_dispatch_mode() is not None:
        raise NotImplementedError
    return x * 2


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (looks_at_values, "it reads tensor values, by aten::"),
        (has_as_many_as_it_finds, "it reads tensor values, by aten::"),
        (counts, "a call changes an object that the function refers to: __defaults__[0][4] changed from nothing to 1"),
        (counts_unseen, "replaying it does not reproduce its results"),
        (as_numpy, "it reads tensor values, by Tensor.numpy"),
        (as_list, "it reads tensor values, by Tensor.tolist"),
        (by_dlpack, "it reads tensor values, by Tensor.__dlpack__"),
        (of_another_file, "it uses a tensor torch.float32 [] that it does not refer to"),
        (is_not_to_be_watched, "it fails while its calls are recorded"),
    ],
    ids=lambda item: getattr(item, "__name__", ""),
)
def test_what_would_not_be_repeated_is_called(function: Callable[[Tensor], Tensor], reason: str) -> None:
    replayed = Replay(function)
    assert replayed.is_replayed is None
    for value in torch.tensor([[1.0, 2.0], [-1.0, -2.0], [3.0, 4.0], [5.0, 6.0], [-7.0, 8.0]]):
        found = replayed(value)
        if not function.__name__.startswith("counts"):
            assert torch.equal(found, function(value))
    assert not replayed.is_replayed
    assert str(replayed.reason).startswith(reason)


def test_the_gradient_of_a_sum_is_not_multiplied_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    h, weight, x = torch.randn(3, 4), torch.randn(5, 4).requires_grad_(), torch.ones(3, 5)

    def step(scale: Tensor) -> Tensor:
        return torch.autograd.grad(ws.linear_bernoulli_log_prob_sum(h, weight, None, x), weight)[0] * scale

    replayed = recorded_by(Replay(step), torch.ones(()))
    with torch.profiler.profile() as profile:
        found = replayed(torch.tensor(2.0))
    names = [event.name for event in profile.events()]
    assert "wakesleep_ext::linear_bernoulli_log_prob_and_gradients" in names
    assert not any("_foreach_mul" in name for name in names)
    torch.testing.assert_close(found, step(torch.tensor(2.0)))


def test_what_a_replay_needs_no_longer_is_freed() -> None:
    """As in Python, only a few of 64 arrays are alive at once."""

    def chain(x: Tensor) -> Tensor:
        for _ in range(64):
            x = x + 1
        return x.sum()

    x = torch.zeros(1000)
    replayed = recorded_by(Replay(chain), x)
    assert replayed(x) == 64 * 1000
    assert peak_bytes(lambda: replayed(x), x.device) < 4 * x.nbytes


def test_what_nobody_uses_is_not_repeated() -> None:
    """Unused draws are repeated, because they advance the generator for later ones."""

    def draw(x: Tensor) -> Tensor:
        x.sin().cos()
        torch.rand(3)
        return x + torch.rand(3)

    x = torch.ones(3)
    replayed = recorded_by(Replay(draw), x)
    assert replayed.is_replayed
    torch.manual_seed(0)
    expected = [draw(x) for _ in range(2)]
    torch.manual_seed(0)
    with torch.profiler.profile() as profile:
        found = [replayed(x) for _ in range(2)]
    assert torch.equal(torch.stack(found), torch.stack(expected))
    names = [event.name for event in profile.events()]
    assert "aten::sin" not in names
    assert names.count("aten::rand") == 4


def test_a_step_as_people_write_it_is_repeated() -> None:
    """The step uses torch's own optimizer, and accumulates gradients in the parameters."""

    def make() -> tuple[Callable[[Tensor], Tensor], Callable[[], list[Tensor]]]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 6))
        optimizer = torch.optim.Adam(model.parameters(), fused=True)

        def step(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = -ws.bernoulli_log_prob(model(x), x).mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        def changed() -> list[Tensor]:
            moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
            gradients = [parameter.grad for parameter in model.parameters()]
            return [*model.state_dict().values(), *moments, *gradients]

        return step, changed

    (step, expected), (other, changed) = make(), make()
    replayed, batches = Replay(other), torch.randint(2, (20, 4, 6)).float()
    assert [replayed(x).item() for x in batches] == [step(x).item() for x in batches]
    assert replayed.is_replayed
    assert all(torch.equal(one, same) for one, same in zip(expected(), changed(), strict=True))


def test_an_error_in_a_replay_leaves_it_usable() -> None:
    images, index = torch.arange(6.0).view(3, 2), torch.tensor([1, 2])
    replayed = recorded_by(Replay(lambda index: images.index_select(0, index)), index)
    assert torch.equal(replayed(index), images[1:])
    with pytest.raises((IndexError, RuntimeError), match=r"index out of range|out of bounds"):
        replayed(torch.tensor([1, 7]))
    assert torch.equal(replayed(index - 1), images[:2])


def test_what_is_asserted_of_one_call_is_asserted_of_all() -> None:
    def root(x: Tensor) -> Tensor:
        torch._assert_async((x >= 0).all())
        return x.sqrt()

    replayed = recorded_by(Replay(root), torch.ones(2))
    assert torch.equal(replayed(torch.tensor([4.0, 9.0])), torch.tensor([2.0, 3.0]))
    assert replayed.is_replayed
    with pytest.raises(RuntimeError, match="nonzero"):
        replayed(torch.tensor([4.0, -9.0]))


# ---- training --------------------------------------------------------------------------------------------------------

STEPS = 200


def losses(trainer: Trainer) -> list[dict[str, float]]:
    return [epoch.losses for epoch in trainer.epochs()]


def make(is_replayed: bool, **config: Any) -> Trainer:
    trainer: Trainer = make_trainer(**{"replay": is_replayed, "epochs": STEPS // 4, "num_samples": 2, **config})
    return trainer


def assert_same_state(one: Trainer, other: Trainer) -> None:
    state, same = one.state_dict(), other.state_dict()
    assert state.keys() == same.keys()
    assert all(torch.equal(state[name], same[name]) for name in state)
    assert one.step == other.step
    assert torch.equal(one.take_step.keys.values, other.take_step.keys.values)


@pytest.mark.parametrize(
    ("config", "captured"),
    [
        ({}, 1),
        ({"learning_rate_decay": 0.01}, 1),
        ({"objective": "reweighted-wake-sleep", "defensive_fraction": 0.1}, 1),
        ({"objective": "reweighted-wake-sleep", "phi_gradient": "dreg", "num_samples": 2, "sleep_weight": 0.1}, 1),
        ({"objective": "vimco", "num_samples": 3}, 1),
        ({"objective": "dreg"}, 1),
        ({"objective": "iwae", "sleep_warm_up": 20}, 2),
    ],
    ids=str,
)
def test_replayed_steps_are_those_of_the_eager_path(recorded: list[Any], config: dict[str, Any], captured: int) -> None:
    eager, replayed = (make(is_replayed, **config) for is_replayed in (False, True))
    assert losses(eager) == losses(replayed)
    assert_same_state(eager, replayed)
    assert eager.step == STEPS
    assert len(recorded) == captured


GROUPED = [
    {"sleep_warm_up": 2, "learning_rate_decay": 0.1},
    {"objective": "reweighted-wake-sleep", "phi_gradient": "dreg", "sleep_weight": 0.1, "max_gradient_norm": 0.1},
]


@pytest.mark.parametrize("steps", [3, thorough(7)])
@pytest.mark.parametrize("config", GROUPED, ids=str)
def test_several_steps_in_one_replay_give_the_bits_of_single_steps(
    recorded: list[Any], config: dict[str, Any], steps: int
) -> None:
    """An epoch has 8 steps, so one or two are left for replays of their own, which need one more recording."""
    config = {"batch_size": 3, "epochs": 5, **config}
    single, called, replayed = (
        make(is_replayed, steps_per_replay=count, **config)
        for is_replayed, count in ((True, 1), (False, steps), (True, steps))
    )
    assert [index.dim() for index in replayed.take_step.batches()] == [2] * (8 // steps) + [1] * (8 % steps)
    expected = losses(single)
    for trainer in (called, replayed):
        assert losses(trainer) == expected
        assert_same_state(trainer, single)
    phases = 2 if "sleep_warm_up" in config else 1
    assert len(recorded) == phases + 2 * phases


def test_what_is_loaded_between_replays_is_trained_on(recorded: list[Any]) -> None:
    replayed, other = (make(is_replayed, learning_rate_decay=0.5) for is_replayed in (True, False))
    for trainer, number in ((replayed, 3), (other, 5)):
        for _ in range(number):
            next(trainer.epochs())
    replayed.load_state_dict(other.state_dict())
    replayed.step = other.step
    assert losses(replayed) == losses(other)
    assert_same_state(replayed, other)
    assert len(recorded) == 1


# ---- on every device -------------------------------------------------------------------------------------------------

DEVICES = ["cpu", *(f"cuda:{index}" for index in range(min(torch.cuda.device_count(), 2)))]
"""The second GPU, if there is one, is not the current device."""


def on_stream(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def head(device: str) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Return a function of rows `[8, 30]` that returns the loss of a layer and a head, and its gradients."""
    hidden, weight = (torch.randn(width, 30, device=device, requires_grad=True) for width in (30, 20))
    pixels = torch.ones(8, 20, device=device)

    def gradients(h: Tensor) -> tuple[Tensor, ...]:
        loss = ws.linear_bernoulli_log_prob_sum((h @ hidden).tanh(), weight, None, pixels)
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    return gradients


@pytest.mark.parametrize("device", DEVICES)
def test_a_replay_follows_autocast(device: str) -> None:
    """A recording made under autocast is used under the same autocast only."""
    kind = torch.device(device).type
    function = head(device)
    replayed = Replay(function)
    for dtype in (None, torch.bfloat16, torch.float16, None):
        with torch.autocast(kind, dtype or torch.bfloat16, enabled=dtype is not None):
            for h in torch.randn(4, 8, 30, device=device):
                for found, expected in zip(replayed(h), replay.call(function, h), strict=True):
                    assert found.dtype == expected.dtype
                    assert torch.equal(found, expected)
            assert replayed.is_replayed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("records_on_a_side_stream", [False, True])
def test_a_replay_runs_on_the_current_stream(device: str, records_on_a_side_stream: bool) -> None:
    """It waits for earlier work of that stream, and later work of that stream waits for it."""
    on_gpu = device != "cpu"
    function, values = head(device), torch.randn(5, 8, 30, device=device)
    expected = [function(h) for h in values]
    streams = [torch.cuda.Stream(device) if on_gpu else None for _ in values]
    replayed = Replay(function)
    if on_gpu:
        torch.cuda.synchronize(device)
    with on_stream(streams[0] if records_on_a_side_stream else None):
        recorded_by(replayed, torch.zeros(8, 30, device=device))
    if on_gpu:
        torch.cuda.synchronize(device)
    found = []
    for number, stream in enumerate(streams):
        with on_stream(stream):
            if stream is not None:
                stream.wait_stream(streams[number - 1])  # a recording has memory for one replay at a time
                torch.cuda._sleep(1_000_000)  # whatever goes to another stream comes too early
            h = values[number] + 0
            found.append([result * 2 for result in replayed(h)])
    if on_gpu:
        torch.cuda.synchronize(device)
    assert replayed.is_replayed
    for results, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(result, 2 * one) for result, one in zip(results, wanted, strict=True))


LONG = {"cpu": 12, "cuda": 3000}
"""The number of steps on each type of device."""


def long_run(device: str, sizes: tuple[int, int], **options: Any) -> tuple[Tensor, Trainer]:
    """Return the losses of many steps of a network with layers of common widths, and its trainer."""
    grey = torch.randint(256, (400, 784), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = Images(grey, white=255, shape=(28, 28))
    model = ModelConfig(784, (50,), (200, 200), (200, 200))
    batch_size, num_samples = sizes
    trainer = make_trainer(images, device, model, batch_size=batch_size, num_samples=num_samples, **options)
    steps = LONG[torch.device(device).type] // trainer.config.steps_per_replay
    batches = islice(cycle(trainer.take_step.batches()), steps)
    return torch.cat([trainer.take_step(index).view(-1, 2) for index in batches]), trainer


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(20, 1), (100, 5)], ids=str)
def test_many_replayed_steps_are_those_of_the_eager_path(device: str, sizes: tuple[int, int]) -> None:
    """Every bit is the same. On a GPU, kernels that are launched early also compute what they would later."""
    expected, eager = long_run(device, sizes, replay=False)
    for launches_early, steps in ((1, 1), (0, 1), (1, 4)):
        _C.set_dependent_launch(launches_early)
        try:
            found, replayed = long_run(device, sizes, steps_per_replay=steps)
        finally:
            _C.set_dependent_launch(None)
        assert torch.equal(found, expected)
        assert_same_state(replayed, eager)
