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


class _Recorded(Protocol):
    def replay(self, arguments: Sequence[Tensor], /) -> Tensor: ...


class Replay:
    """Calls a function by replaying what its first call recorded.

    Python in the function runs at the first call only: whatever is to differ from call to call must be in tensors. On
    a CPU a function that does not keep to that, because it looks at values, is found out where it can be, and called as
    it stands.

    Args:
        function: calls the same operators whatever the values of its arguments, of which there is one at least, reads
            none of them and changes no argument.
        state: gives every tensor that outlasts a call and that `function` changes, always in place. The calls that come
            before the first replay leave no trace in them.
    """

    def __init__(self, function: Function, state: Callable[[], Iterable[Tensor]]) -> None:
        self._function = function
        self._state = state
        self._likes: list[tuple[torch.Size, torch.dtype]] | None = None
        self._recorded: _Recorded | None = None

    @property
    def is_replayed(self) -> bool | None:
        """Whether the function is replayed, rather than called as it stands; None before the first call."""
        return None if self._likes is None else self._recorded is not None

    def __call__(self, *arguments: Tensor) -> Tensor:
        """What the function returns of arguments that are like those of the first call, as a tensor of its own.

        Raises:
            ValueError: an argument has another shape or dtype than at the first call.
        """
        likes = [(argument.shape, argument.dtype) for argument in arguments]
        if self._likes is None:
            own, state = [argument.clone() for argument in arguments], list(self._state())
            record = _RECORD_ON.get(own[0].device.type, _record)
            with _undone(state):
                self._recorded = record(self._function, own, state)
            self._likes = likes
        if self._recorded is None:
            return self._function(*arguments)
        if likes != self._likes:
            expected, got = (", ".join(f"{dtype} {list(shape)}" for shape, dtype in of) for of in (self._likes, likes))
            raise ValueError(f"Replay: expected arguments as they were recorded, {expected}, got {got}")
        return self._recorded.replay(arguments)


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


class _Captured:
    """The kernels of a function as one graph, and the memory where it finds arguments and leaves the result."""

    def __init__(self, function: Function, arguments: Sequence[Tensor], state: Sequence[Tensor]) -> None:
        self._arguments = arguments
        with torch.cuda.device(arguments[0].device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(side):
                    for _ in range(_WARM_UPS):
                        function(*arguments)
            finally:
                torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._result = function(*arguments)

    def replay(self, arguments: Sequence[Tensor], /) -> Tensor:
        for held, argument in zip(self._arguments, arguments, strict=True):
            held.copy_(argument)
        self._graph.replay()
        return self._result.clone()


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


def _record(function: Function, arguments: Sequence[Tensor], state: Sequence[Tensor]) -> _Recorded | None:
    """The recording of one call, which must then repeat the next one to the bit; or None."""
    with _undone(state):
        function(*arguments)
        expected = [function(*arguments).clone(), *(tensor.clone() for tensor in state)]
    recording = Recording(arguments)
    try:
        with _Recorder(recording):
            recording.returns(function(*arguments))
    except Exception:  # a call that fails under a mode, as torch.cond does; without, it has just succeeded
        return None
    if not recording.is_repeatable:
        return None
    found = [recording.replay(arguments), *state]
    return recording if all(map(torch.equal, expected, found)) else None


_RECORD_ON: dict[str, Callable[..., _Recorded | None]] = {"cuda": _Captured}
"""Devices whose work is not recorded operator by operator."""
