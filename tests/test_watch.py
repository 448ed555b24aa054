"""Change something after a step is recorded, and check that the next step equals a called one bit for bit."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wakesleep_ext.replay import Replay
from wakesleep_ext.watch import Reach

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9),
    "Adam": lambda parameters, lr: torch.optim.Adam(parameters, lr, fused=True),
    "Adam that looks at its step": lambda parameters, lr: torch.optim.Adam(parameters, lr),
    "AdamW": lambda parameters, lr: torch.optim.AdamW(parameters, lr, fused=True),
    "RMSprop": lambda parameters, lr: torch.optim.RMSprop(parameters, lr),
}
LOOK_AT_VALUES = {"Adam that looks at its step"}
LOOK_AT_TENSOR_LR = {"SGD", "RMSprop"}


class Training:
    """Trains a small network in the usual way."""

    def __init__(self, optimizer: str, lr: Any = 0.05) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters(), lr)
        self.config = SimpleNamespace(scale=1.0, samples=1)
        self.targets = torch.randn(4, 3)

    def step(self, x: Tensor) -> dict[str, Tensor]:
        self.optimizer.zero_grad()
        output = self.model(x.to(self.model[0].weight.dtype))
        loss = (self.config.scale * (output.float() - self.targets) ** 2).mean()
        for _ in range(self.config.samples):
            loss = loss * 1.5
        if loss.requires_grad:
            loss.backward()
            self.optimizer.step()
        return {"loss": loss.detach(), "output": output.detach()}

    def state(self) -> list[Tensor | None]:
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return [*self.model.state_dict().values(), *moments, *(p.grad for p in self.model.parameters())]


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def run_both(
    optimizer: str, change: Callable[[Training], object], context: Callable[[], Any] = nullcontext, lr: Any = None
) -> Replay:
    """Run steps before and after a change, called and replayed."""
    is_replayed = optimizer not in LOOK_AT_VALUES and (lr is None or optimizer not in LOOK_AT_TENSOR_LR)
    called, replayed = (Training(optimizer, 0.05 if lr is None else lr.clone()) for _ in range(2))
    replay = Replay(replayed.step)
    for number in range(30):
        if number == 15:
            change(called), change(replayed)
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
        with context():
            expected = called.step(x)
        with context():
            found = replay(x)
        assert_same(found, expected)
        assert_same(replayed.state(), called.state())
        if number == 14:
            assert replay.is_replayed is is_replayed, replay.reason
    return replay


def set_in_group(**values: Any) -> Callable[[Training], object]:
    return lambda training: training.optimizer.param_groups[0].update(values)


def new_parameter(training: Training) -> None:
    training.model[0].weight = nn.Parameter(torch.ones(7, 5))
    training.optimizer.add_param_group({"params": [training.model[0].weight]})


def double_gradients(training: Training) -> None:
    training.model[2].weight.register_hook(lambda gradient: 2 * gradient)


def triple_outputs(training: Training) -> None:
    training.model[1].register_forward_hook(lambda module, inputs, output: 3 * output)


CHANGES: dict[str, tuple[str, Callable[[Training], object]]] = {
    "an optimizer's state is loaded": (
        "self.optimizer.", lambda t: t.optimizer.load_state_dict(copy.deepcopy(t.optimizer.state_dict())),
    ),
    "weights are assigned": (
        "self.model._modules['0']._parameters['weight']",
        lambda t: t.model.load_state_dict({k: v * 1.5 for k, v in t.model.state_dict().items()}, assign=True),
    ),
    "a new parameter": ("self.model._modules['0']._parameters['weight']", new_parameter),
    "a frozen layer": ("requires a gradient", lambda t: t.model[0].requires_grad_(False)),
    "all are frozen": ("requires a gradient", lambda t: t.model.requires_grad_(False)),
    "another dtype": ("torch.float64", lambda t: t.model.double()),
    "other memory": (" at 0x", lambda t: setattr(t.model[0].weight, "data", t.model[0].weight.data * 1.5)),
    "lr": ("param_groups[0]['lr'] changed from 0.05 to 0.01", set_in_group(lr=0.01)),
    "a number in a config": ("self.config.samples changed from 1 to 2", lambda t: setattr(t.config, "samples", 2)),
    "another config": ("self.config", lambda t: setattr(t, "config", SimpleNamespace(scale=2.0, samples=1))),
    "other data": ("self.targets changed", lambda t: setattr(t, "targets", torch.ones(4, 3))),
    "a hook of a parameter": ("_backward_hooks would not run in a replay", double_gradients),
    "a hook of a module": ("_forward_hooks would not run in a replay", triple_outputs),
    "another activation": ("self.model._modules['1']", lambda t: t.model.__setitem__(1, nn.ReLU())),
    "a class that is changed": ("self.model._modules['1']", lambda t: setattr(t.model[1], "__class__", nn.Sigmoid)),
    "a forward of its own": (
        "self.model._modules['1'].forward", lambda t: setattr(t.model[1], "forward", lambda h: h.sin()),
    ),
    "no gradient": (".grad", lambda t: setattr(t.model[0].weight, "grad", None)),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_after_a_change_is_that_of_a_call(optimizer: str, change: str) -> None:
    reason, body = CHANGES[change]
    if change == "another dtype" and "Adam" in optimizer:
        pytest.skip("torch's Adam keeps the moments in the dtype of before")
    replay = run_both(optimizer, body)
    if optimizer not in LOOK_AT_VALUES:
        assert reason in str(replay.reason)
        assert replay.is_replayed is ("hook" not in change)


@pytest.mark.parametrize(
    ("optimizer", "name", "value"),
    [
        ("SGD", "momentum", 0.5), ("SGD", "nesterov", True), ("SGD", "weight_decay", 0.1),
        ("Adam", "betas", (0.5, 0.9)), ("Adam", "eps", 0.1), ("AdamW", "weight_decay", 0.5),
        ("AdamW", "maximize", True), ("RMSprop", "alpha", 0.5), ("RMSprop", "eps", 0.1),
    ],
)  # fmt: skip
def test_every_number_of_an_optimizer_takes_effect(optimizer: str, name: str, value: Any) -> None:
    replay = run_both(optimizer, set_in_group(**{name: value}))
    assert f"param_groups[0]['{name}']" in str(replay.reason)
    assert replay.is_replayed


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("change", [change for change in CHANGES if change != "another dtype"])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_the_same_under_autocast(optimizer: str, change: str) -> None:
    run_both(optimizer, CHANGES[change][1], autocast)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("context", [nullcontext, autocast])
def test_a_learning_rate_that_is_a_tensor(optimizer: str, context: Callable[[], Any]) -> None:
    """Each step reads the tensor, so a change in place needs no new recording."""
    if optimizer == "Adam that looks at its step":
        pytest.skip("torch's Adam takes no tensor there")

    def fall(training: Training) -> None:
        training.optimizer.param_groups[0]["lr"].mul_(0.5)

    replay = run_both(optimizer, fall, context, lr=torch.tensor(0.05))
    if replay.is_replayed:
        assert replay.reason is None
    else:
        assert "reads tensor values" in str(replay.reason)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "RMSprop"])
@pytest.mark.parametrize("every", [1, 12])
def test_schedulers(optimizer: str, every: int) -> None:
    """Values that change rarely are recorded again. A step is called if they change every time."""
    called, replayed = Training(optimizer), Training(optimizer)
    replay = Replay(replayed.step)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(t.optimizer, 0.9) for t in (called, replayed)]
    for number in range(60):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
        assert_same(replay(x), called.step(x))
        if number % every == every - 1:
            for scheduler in schedulers:
                scheduler.step()
    assert_same(replayed.state(), called.state())
    assert replay.is_replayed is (every > 1)
    assert "['lr'] changed from 0.0" in str(replay.reason)


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "mode", [autocast, torch.no_grad, torch.inference_mode, default_dtype, deterministic], ids=lambda m: m.__name__
)
def test_modes(mode: Callable[[], Any]) -> None:
    weight = torch.randn(3, 3, requires_grad=True)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ weight, torch.ones(2).div(3) * torch.is_grad_enabled()

    replay, x = Replay(function), torch.randn(3, 3)
    for inside in [False] * 12 + [True] * 3 + [False] * 3:
        with mode() if inside else nullcontext():
            assert_same([t.detach() for t in replay(x)], [t.detach() for t in function(x)])
    assert "a mode of torch changed" in str(replay.reason)


SCALE = 2.0


def test_globals_closures_and_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    of_closure = 3.0

    def function(x: Tensor, of_default: list[float] = [5.0]) -> Tensor:  # noqa: B006
        return x * SCALE * of_closure * of_default[0]

    replay, x = Replay(function), torch.ones(2)
    for _ in range(12):
        assert replay(x)[0] == 30
    monkeypatch.setitem(globals(), "SCALE", 4.0)
    for _ in range(12):
        assert replay(x)[0] == 60
    assert replay.reason == "SCALE changed from 2.0 to 4.0"
    of_closure = 1.0
    for _ in range(12):
        assert replay(x)[0] == 20
    assert replay.reason == "of_closure changed from 3.0 to 1.0"
    function.__defaults__[0][0] = 7.0  # type: ignore[index]
    assert replay(x)[0] == 28
    assert replay.reason == "__defaults__[0][0] changed from 5.0 to 7.0"


def test_a_hook_of_all_modules_is_called() -> None:
    training, x = Training("SGD"), torch.ones(4, 5)
    replay = Replay(training.step)
    for _ in range(5):
        replay(x)
    assert replay.is_replayed, replay.reason
    calls: list[str] = []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module).__name__)):
        for _ in range(5):
            replay(x)
    assert calls == ["Linear", "Tanh", "Linear", "Sequential"] * 5
    for _ in range(3):
        replay(x)
    assert replay.is_replayed, replay.reason


def test_a_state_that_is_replaced_at_every_call_is_used() -> None:
    """A recurrent network has such a state."""
    cell = SimpleNamespace(h=torch.zeros(3))

    def step(x: Tensor) -> Tensor:
        cell.h = (cell.h + x).tanh()
        return cell.h.clone()

    replay, h = Replay(step), torch.zeros(3)
    for _ in range(6):
        h = (h + 1).tanh()
        assert torch.equal(replay(torch.ones(3)), h)
    assert replay.is_replayed is False
    assert str(replay.reason).startswith(
        "a call changes an object that the function refers to: cell.h changed from a tensor"
    )


TOTAL = torch.zeros(3)


def test_a_global_that_is_replaced_at_every_call() -> None:
    def step(x: Tensor) -> Tensor:
        global TOTAL
        TOTAL = TOTAL + x
        return TOTAL.clone()

    replay = Replay(step)
    for number in range(1, 7):
        assert torch.equal(replay(torch.ones(3)), torch.full((3,), float(number)))
    assert replay.is_replayed is False


def test_gradients_that_accumulate() -> None:
    weight = torch.ones(3, requires_grad=True)

    def step(x: Tensor) -> Tensor:
        loss = (weight * x).sum()
        loss.backward()
        return loss.detach()

    replay, x = Replay(step), torch.tensor([1.0, 2.0, 3.0])
    for number in range(1, 12):
        replay(x)
        assert torch.equal(weight.grad, number * x)
    assert replay.is_replayed
    weight.grad = None
    for number in range(1, 5):
        replay(x)
        assert torch.equal(weight.grad, number * x)


def test_what_a_call_leaves_behind_is_of_the_latest() -> None:
    box = SimpleNamespace(last=torch.zeros(3))

    def step(x: Tensor) -> Tensor:
        box.last = x * 2
        return x * 3

    replay = Replay(step)
    for value in range(6):
        before = box.last.clone()
        kept = box.last.detach()
        replay(torch.full((3,), float(value)))
        assert torch.equal(box.last, torch.full((3,), 2.0 * value))
        assert torch.equal(kept, before)  # what was taken before stays
    assert replay.is_replayed


@pytest.mark.parametrize(
    "result", [lambda x: None, lambda x: [x], lambda x: (x, 1.0), lambda x: {"a": x, "b": None}, lambda x: 1.0]
)
def test_results_that_cannot_be_replayed_are_refused(result: Callable[[Tensor], Any]) -> None:
    with pytest.raises(TypeError, match="Replay: expected the function to return a tensor, or a tuple or dict"):
        Replay(result)(torch.ones(2))


def test_results_in_tuples_and_dicts() -> None:
    for function in (lambda x: (x + 1, x + 1), lambda x: {"a": x, "b": (x * 2, x)}):
        replay = Replay(function)
        for value in range(4):
            x = torch.full((2,), float(value))
            assert_same(replay(x), function(x))
        assert replay.is_replayed


def test_what_a_recording_refers_to_is_freed_with_it() -> None:
    """This holds even if the function and the owner of the replay refer to each other."""
    training: Any = Training("Adam")
    training.replay = Replay(training.step)
    for _ in range(4):
        training.replay(torch.ones(4, 5))
    assert training.replay.is_replayed
    gone = weakref.ref(training)
    del training
    gc.collect()
    assert gone() is None


def test_changes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "wakesleep_ext.replay"):
        run_both("SGD", set_in_group(lr=0.01))
    assert "Replay of Training.step: self.optimizer.param_groups[0]['lr'] changed from 0.05 to 0.01" in caplog.messages


def test_names_of_what_is_reached() -> None:
    training = Training("SGD")
    reach = Reach(training.step)
    assert reach.tensors["self.targets"] is training.targets
    assert reach.name_of(training.model[2].bias.detach()) in {
        "self.model._modules['2']._parameters['bias']",
        "self.optimizer.param_groups[0]['params'][3]",
    }
