"""A function of tensors, recorded once and replayed from then on: on a GPU the kernels that it launches, as one CUDA
graph; on a CPU the operators that it calls, without Python, without autograd, without anything between them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from wakesleep_ext._C import Recording, Watch
from wakesleep_ext.watch import Conditions, Reach, Unwatched

_WARM_UPS = 3
"""As many as `torch.cuda.make_graphed_callables` makes; libraries set themselves up in the first."""
_WORTH = 10
"""Replays that make up for recording a function."""
_PATIENCE = 5
"""Changes that each came before a recording was worth it; after as many a function is called as it stands for good."""

_log = logging.getLogger(__name__)

Function = Callable[..., Any]


class NotRepeatableError(Exception):
    """Why a function cannot be replayed."""


class _Recorded(Protocol):
    def replay(self, arguments: Sequence[Tensor], watch: Watch | None = None, /) -> list[Tensor] | None:
        """Nothing is replayed, and None returned, if the watch does not hold."""


class Replay(Unwatched):
    """Calls a function by replaying what an earlier call recorded.

    The first call is an ordinary one. If it leaves everything that the function refers to as it was, tensors apart,
    the next call records. From then on Python in the function does not run: whatever is to differ from call to call
    must be in tensors.

    Before each replay it is checked that what the recording depends on still holds: the tensors that the function
    refers to and where they lie, numbers, modes of torch such as autocast (:mod:`wakesleep_ext.watch`). If something
    has changed, the function is called, and the call after that records it again. A function for which that keeps
    happening, one that looks at values, or one with hooks, is called as it stands. :attr:`reason` says why.

    Two kinds of change are not noticed: in what a watch does not look into, and in what Python gets by other ways than
    a reference, such as the time, a file or a random number of its own.

    Args:
        function: gives a tensor, or a tuple or dict of tensors. It calls the same operators whatever the values of its
            arguments, which are tensors, one at least, and which it does not change. A tensor that it leaves behind,
            such as a gradient, has the value of the latest call. Results do not require gradients.
        state: gives tensors that the function changes in a way that torch does not know of, as a kernel of its own
            might. All others are found. The calls that come before the first replay leave no trace in them.
    """

    def __init__(self, function: Function, state: Callable[[], Iterable[Tensor]] = lambda: ()) -> None:
        self._function = function
        self._state = state
        self._likes: list[tuple[torch.Size, torch.dtype, torch.device]] | None = None
        self._is_settled = False
        self._conditions: Conditions | None = None
        self._recorded: _Recorded | None = None
        self._structure: Any = None
        self._uses = 0  # of this recording
        self._changes = 0  # in a row that came too early
        self._reason: str | None = None

    @property
    def is_replayed(self) -> bool | None:
        """Whether the function is replayed, rather than called as it stands; None while that is not known."""
        if self._recorded is not None:
            return True
        return False if self._conditions is not None or self._changes >= _PATIENCE else None

    @property
    def reason(self) -> str | None:
        """Why the function cannot be replayed, or what made it be recorded again; None if nothing did."""
        return self._reason

    def __call__(self, *arguments: Tensor) -> Any:
        """What the function returns of arguments that are like those of the first call, in tensors of its own.

        Raises:
            ValueError: an argument has another shape, dtype or device than at the first call.
            TypeError: the function returns something else than a tensor or a tuple or dict of tensors.
        """
        likes = [(argument.shape, argument.dtype, argument.device) for argument in arguments]
        if likes != self._likes:
            self._check(likes)
        if self._is_settled:
            self._record(arguments)
        found = self._replayed(arguments)
        if found is not None:
            return found[0] if self._structure is None else tree_unflatten(found, self._structure)
        if self.is_replayed is None:
            return self._settle(arguments)
        self._uses += 1
        return call(self._function, *arguments)

    def _replayed(self, arguments: Sequence[Tensor]) -> list[Tensor] | None:
        """What a replay returns, if there is a recording and what it depends on still holds."""
        if self._conditions is None:
            return None
        if self._recorded is None:
            found, holds = None, self._conditions.watch.holds()
        else:
            found = self._recorded.replay(arguments, self._conditions.watch)
            holds = found is not None
        if not holds:
            self._forget(self._conditions.change())
        elif found is not None:
            self._uses += 1
        return found

    def _check(self, likes: list[tuple[torch.Size, torch.dtype, torch.device]]) -> None:
        if self._likes is None:
            self._likes = likes
            return
        expected, got = (
            ", ".join(f"{dtype} {list(shape)} on {device}" for shape, dtype, device in of)
            for of in (self._likes, likes)
        )
        raise ValueError(f"Replay: expected arguments as they were recorded, {expected}, got {got}")

    def _forget(self, change: str) -> None:
        self._say(change)
        self._changes = self._changes + 1 if self._uses < _WORTH else 1
        self._recorded = self._conditions = None
        self._uses = 0

    def _say(self, reason: str) -> None:
        self._reason = reason
        _log.info("Replay of %s: %s", getattr(self._function, "__qualname__", self._function), reason)

    def _settle(self, arguments: Sequence[Tensor]) -> Any:
        """An ordinary call, and whether the next one will find all that it refers to as this one did."""
        before = Reach(self._function)
        result = call(self._function, *arguments)
        after = Reach(self._function)
        _flat(result)
        moved = (words for name, words in before.changes(after) if not before.is_alike(after, name))
        change = next(moved, None)
        self._is_settled = change is None
        if change is not None:
            self._changes += 1
            if self._changes >= _PATIENCE:
                self._say(f"a call changes what it refers to: {change}")
        return result

    def _record(self, arguments: Sequence[Tensor]) -> None:
        self._is_settled = False
        before = Reach(self._function)
        try:
            self._recorded, self._structure, left = _record(self._function, arguments, self._state(), before)
        except BaseException as error:
            before.restore()
            if not isinstance(error, NotRepeatableError):
                raise
            self._say(str(error))
            # a call may put any tensor elsewhere
            self._conditions = Conditions(self._function, before, before.tensors.values())
        else:
            self._conditions = Conditions(self._function, Reach(self._function), left)


def call(function: Function, *arguments: Tensor) -> Any:
    """Calls a function as :class:`Replay` does: of weights that autocast casts it keeps no copies.

    Copies would outlive the step that made them, and replays would read those instead of the weights.
    """
    is_kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        return function(*arguments)
    finally:
        torch.set_autocast_cache_enabled(is_kept)


def _flat(result: Any) -> tuple[list[Tensor], Any]:
    """The tensors of a result, and its structure; None for that of a tensor."""
    if isinstance(result, Tensor):
        return [result], None
    tensors, structure = tree_flatten(result)
    if not isinstance(result, tuple | dict) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        of = ", ".join(type(tensor).__name__ for tensor in tensors) if isinstance(result, tuple | dict) else ""
        raise TypeError(
            f"Replay: expected the function to return a tensor, or a tuple or dict of tensors, "
            f"got {type(result).__name__}" + f" of {of}" * bool(of)
        )
    return tensors, structure


# ---- recording -------------------------------------------------------------------------------------------------------


def _record(
    function: Function, arguments: Sequence[Tensor], state: Iterable[Tensor], before: Reach
) -> tuple[_Recorded, Any, Sequence[Tensor]]:
    """A recording, the structure of what it returns, and the tensors that each replay puts elsewhere.

    It has repeated a call to the bit. None of the calls leaves a trace in tensors or in a generator.

    Raises:
        NotRepeatableError: there can be no such recording.
    """
    if before.hook is not None:
        raise NotRepeatableError(f"{before.hook} is called with it")
    own = [argument.clone() for argument in arguments]
    device = own[0].device
    touched = [*state, *before.buffers]
    noted = Recording(own)
    with _undone(touched, device):
        try:
            structure, outside = _note(noted, function, own)
        finally:
            noted.undo()
    _check_changes(before, Reach(function), _names_of(outside, before), noted.left_behind)
    before.restore()
    touched += noted.written
    with _undone(touched, device):
        expected = _copies([*_flat(call(function, *own))[0], *touched])
    before.restore()
    recorded, left = _RECORD_ON.get(device.type, _repeat)(function, own, touched)
    with _undone(touched, device):
        if not all(map(_same_bits, expected, _copies([*(recorded.replay(own) or ()), *touched]))):
            raise NotRepeatableError("its recording does not repeat what it does")
    return recorded, structure, left


def _names_of(outside: Sequence[Tensor], reach: Reach) -> set[str]:
    """By which names a function refers to the tensors that it gets from outside."""
    names = set()
    for tensor in outside:
        name = reach.name_of(tensor)
        if name is None:
            raise NotRepeatableError(f"it uses a tensor {tensor.dtype} {list(tensor.shape)} that it does not refer to")
        names.add(name)
    return names


def _check_changes(before: Reach, after: Reach, used: set[str], made: Sequence[Tensor]) -> None:
    """That the function refers to what it did, but for tensors that it makes at every call and does not use."""
    identities = {id(tensor) for tensor in made}
    for name, words in before.changes(after):
        if name in used or not (before.is_alike(after, name) and id(after.tensors[name]) in identities):
            raise NotRepeatableError(f"a call changes what it refers to: {words}")


@contextmanager
def _undone(tensors: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """Whatever happens to tensors, and to torch's generators of random numbers, is undone at the end."""
    before = _copies(tensors)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, before, strict=True):
                    tensor.copy_(value)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


# ---- on a CPU --------------------------------------------------------------------------------------------------------

_EXITS = {Tensor.numpy, Tensor.tolist, Tensor.data_ptr, Tensor.__array__, Tensor.__dlpack__}
"""By which values leave for Python unnoticed by torch's dispatcher."""


class _Borders(TorchFunctionMode):
    """Notes whether a value leaves for Python, and which tensors are made of Python's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.exit = ""
        self.constants: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _EXITS:
            self.exit = f"Tensor.{func.__name__}"
        if func is Tensor.new_tensor:
            self.constants.append(result)
        return result


class _Calls(TorchDispatchMode):
    """Has what is called while it is on noted in a recording."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, overload = func._schema.name, func._schema.overload_name
        return self._recording.call(name, overload, *args, **(kwargs or {}))


def _note(recording: Recording, function: Function, arguments: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
    """Calls a function, and notes what it calls; the structure of its result, and the tensors it gets from outside."""
    borders = _Borders()
    try:
        with borders, _Calls(recording):
            result = call(function, *arguments)
    except Exception as error:  # under a mode, as torch.cond does; without, it has just succeeded
        raise NotRepeatableError(f"it does not run where its calls are noted: {error!r}") from error
    tensors, structure = _flat(result)
    recording.returns(tensors)
    del tensors, result
    recording.stop()
    if reader := recording.unrepeatable or borders.exit:
        raise NotRepeatableError(f"it looks at values, by {reader}")
    constants = set(map(id, borders.constants))
    return structure, [tensor for tensor in recording.outside if id(tensor) not in constants]


def _repeat(
    function: Function, arguments: Sequence[Tensor], touched: Sequence[Tensor]
) -> tuple[_Recorded, Sequence[Tensor]]:
    """The operators that a function calls."""
    recording = Recording(arguments)
    with _undone(touched, arguments[0].device):
        _note(recording, function, arguments)
        recording.undo()  # which frees the copies that it has made
    return recording, recording.left_behind


# ---- on a GPU --------------------------------------------------------------------------------------------------------


class _Captured:
    """The kernels of a function as one graph, and the memory where it finds arguments and leaves the result."""

    def __init__(self, function: Function, arguments: Sequence[Tensor]) -> None:
        self._arguments = arguments
        with torch.cuda.device(arguments[0].device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(side):
                    for _ in range(_WARM_UPS):
                        call(function, *arguments)
            finally:
                torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=side):  # torch's own stream for this is the first device's
                self._results, _ = _flat(call(function, *arguments))

    def replay(self, arguments: Sequence[Tensor], watch: Watch | None = None, /) -> list[Tensor] | None:
        if watch is not None and not watch.holds():
            return None
        for held, argument in zip(self._arguments, arguments, strict=True):
            held.copy_(argument)
        self._graph.replay()
        return [result.clone() for result in self._results]


def _capture(
    function: Function, arguments: Sequence[Tensor], touched: Sequence[Tensor]
) -> tuple[_Recorded, Sequence[Tensor]]:
    """The kernels that a function launches. What it leaves behind stays where the graph writes it."""
    with _undone(touched, arguments[0].device):
        return _Captured(function, arguments), ()


_RECORD_ON: dict[str, Callable[..., tuple[_Recorded, Sequence[Tensor]]]] = {"cuda": _capture}
"""Devices whose work is not recorded operator by operator."""
