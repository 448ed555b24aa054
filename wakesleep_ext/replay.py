"""A function of tensors, recorded once and replayed from then on: on a GPU the kernels that it launches, as one CUDA
graph; on a CPU the operators that it calls, without Python, without autograd, without anything between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wakesleep_ext._C import Recording

_WARM_UPS = 3
"""As many as `torch.cuda.make_graphed_callables` makes; libraries set themselves up in the first."""

Function = Callable[..., Tensor]


class _Graph(Protocol):
    def replay(self) -> None: ...


class Replay:
    """Calls a function by replaying what its first call recorded.

    Python in the function runs at the first call only: whatever is to differ from call to call must be in tensors. On
    a CPU a function that does not keep to that, because it looks at values, is found out where it can be, and called as
    it stands.

    Args:
        function: calls the same operators whatever the values of its arguments, of which there is one at least, and
            reads none of them.
        state: gives every tensor that outlasts a call and that `function` changes, always in place. The calls that come
            before the first replay leave no trace in them.
    """

    def __init__(self, function: Function, state: Callable[[], Iterable[Tensor]]) -> None:
        self._function = function
        self._state = state
        self._recorded: tuple[_Graph | None, list[Tensor], Tensor] | None = None

    @property
    def is_replayed(self) -> bool | None:
        """Whether the function is replayed, rather than called as it stands; None before the first call."""
        return None if self._recorded is None else self._recorded[0] is not None

    def __call__(self, *arguments: Tensor) -> Tensor:
        """What the function returns of arguments that are like those of the first call, as a tensor of its own.

        Raises:
            ValueError: an argument has another shape or dtype than at the first call.
        """
        if self._recorded is None:
            own, state = [argument.clone() for argument in arguments], list(self._state())
            record = _RECORD_ON.get(own[0].device.type, _record)
            with _undone(state):
                graph, result = record(self._function, own, state)
            self._recorded = graph, own, result
        graph, own, result = self._recorded
        if graph is None:
            return self._function(*arguments)
        for held, argument in zip(own, arguments, strict=True):
            if (held.shape, held.dtype) != (argument.shape, argument.dtype):
                expected, got = (f"{t.dtype} {list(t.shape)}" for t in (held, argument))
                raise ValueError(f"Replay: expected an argument as it was recorded, {expected}, got {got}")
            held.copy_(argument)
        graph.replay()
        return result.clone()


@contextmanager
def _undone(state: Sequence[Tensor]) -> Iterator[None]:
    """Whatever happens to tensors, and to torch's generator of random numbers, is undone at the end."""
    before, generator = [tensor.detach().clone() for tensor in state], torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(generator)
        with torch.no_grad():
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def _capture(function: Function, arguments: Sequence[Tensor], state: Sequence[Tensor]) -> tuple[_Graph, Tensor]:
    """The graph, and where it leaves what the function returns."""
    with torch.cuda.device(arguments[0].device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    function(*arguments)
        finally:
            torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function(*arguments)
        return graph, result


# ---- on a CPU --------------------------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """Has what is called while it is on noted in a recording."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __enter__(self) -> _Recorder:
        self._recording.start()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._recording.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, overload = func._schema.name, func._schema.overload_name
        return self._recording.call(name, overload, *args, **(kwargs or {}))


def _record(function: Function, arguments: Sequence[Tensor], state: Sequence[Tensor]) -> tuple[_Graph | None, Tensor]:
    """The recording of one call, which must then repeat the next one to the bit; or None."""
    with _undone(state):
        result = function(*arguments).clone()
        expected = [function(*arguments).clone(), *(tensor.clone() for tensor in state)]
    recording = Recording()
    try:
        with _Recorder(recording):
            result.copy_(function(*arguments))
    except Exception:  # a call that fails under a mode, as torch.cond does; without, it has just succeeded
        return None, result
    if not recording.is_repeatable:
        return None, result
    recording.replay()
    is_same = all(torch.equal(one, other) for one, other in zip(expected, [result, *state], strict=True))
    return recording if is_same else None, result


_RECORD_ON = {"cuda": _capture}
"""Devices whose work is not recorded operator by operator."""
