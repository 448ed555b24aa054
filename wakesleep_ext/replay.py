"""Record a call of a function of tensors, then replay the recording instead of calling the function.

On a GPU, a replay launches the function's kernels as one CUDA graph. On a CPU, a replay calls the function's operators
directly, without the overhead of Python, autograd and other dispatch.
"""

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
"""Number of calls before a CUDA graph capture, as in `torch.cuda.make_graphed_callables`. Libraries initialise in the
first call."""
_WORTH = 10
"""The number of replays needed to recover the time spent on one recording."""
_PATIENCE = 5
"""A function is not recorded again after this many consecutive changes if fewer than `_WORTH` replays preceded each."""

_log = logging.getLogger(__name__)

Function = Callable[..., Any]


class NotRepeatableError(Exception):
    """A function cannot be replayed. The message gives the reason."""


class _Recorded(Protocol):
    def replay(self, arguments: Sequence[Tensor], watch: Watch | None = None, /) -> list[Tensor] | None:
        """Replay the recording. If the watch finds a change, return None without replaying."""


class Replay(Unwatched):
    """Replays a recorded call of a function instead of calling the function.

    The first call runs the function as usual. If this call changes no object that the function refers to, apart from
    tensors, the second call is recorded. After that, calls are replayed, and the function's Python code does not run.
    Anything that varies from call to call must be in tensors.

    Before each replay, a watch checks that the recording is still valid (:mod:`wakesleep_ext.watch`). The recording
    depends on the tensors and numbers that the function refers to, the tensors' addresses, and torch modes such as
    autocast. After a change, the function is called as usual, and its next call is recorded again.

    If changes recur too often, the function is never recorded again. The function is also called directly, without
    replay, as long as it reads tensor values in Python or has hooks. :attr:`reason` says why.

    Replay does not detect changes inside objects that the watch does not look into. It also does not detect changes in
    values without a Python reference, such as the time, a file or Python's random numbers.

    Args:
        function: takes one or more tensors, does not modify them, and returns a tensor, or a tuple or dict of tensors.
            It must call the same operators for any tensor values. A tensor that the function creates and that outlives
            the call, such as a gradient, is overwritten by every replay. Results do not require gradients.
        state: returns tensors that the function modifies without torch's knowledge, as a custom kernel might. All other
            modified tensors are found automatically. Recording calls the function several times, and then restores all
            modified tensors.
    """

    def __init__(self, function: Function, state: Callable[[], Iterable[Tensor]] = lambda: ()) -> None:
        self._function = function
        self._state = state
        self._likes: list[tuple[torch.Size, torch.dtype, torch.device]] | None = None
        self._is_settled = False
        self._conditions: Conditions | None = None
        self._recorded: _Recorded | None = None
        self._structure: Any = None
        self._uses = 0  # replays or direct calls since the last recording
        self._changes = 0  # consecutive changes, each after fewer than `_WORTH` uses
        self._reason: str | None = None

    @property
    def is_replayed(self) -> bool | None:
        """True if calls are replayed, False if the function is called directly, None if this is not yet decided."""
        if self._recorded is not None:
            return True
        return False if self._conditions is not None or self._changes >= _PATIENCE else None

    @property
    def reason(self) -> str | None:
        """Why the function cannot be replayed, or why its last recording was discarded; None if neither happened."""
        return self._reason

    def __call__(self, *arguments: Tensor) -> Any:
        """Return the function's result, in new tensors. The arguments must match the arguments of the first call.

        Raises:
            ValueError: an argument differs from the first call's argument in shape, dtype or device.
            TypeError: the function does not return a tensor, or a tuple or dict of tensors.
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
        """Return the result of a replay, or None if there is no valid recording."""
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
        raise ValueError(f"Replay: expected arguments as in the first call, {expected}, got {got}")

    def _forget(self, change: str) -> None:
        self._say(change)
        self._changes = self._changes + 1 if self._uses < _WORTH else 1
        self._recorded = self._conditions = None
        self._uses = 0

    def _say(self, reason: str) -> None:
        self._reason = reason
        _log.info("Replay of %s: %s", getattr(self._function, "__qualname__", self._function), reason)

    def _settle(self, arguments: Sequence[Tensor]) -> Any:
        """Call the function as usual, and record whether the call changed any object that the function refers to."""
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
                self._say(f"a call changes an object that the function refers to: {change}")
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
            # a direct call may replace any tensor, so the watch ignores tensors
            self._conditions = Conditions(self._function, before, before.tensors.values())
        else:
            self._conditions = Conditions(self._function, Reach(self._function), left)


def call(function: Function, *arguments: Tensor) -> Any:
    """Call a function as :class:`Replay` does: with autocast's weight cache disabled.

    Cached casts would outlive the step that created them, and replays would read them instead of the current weights.
    """
    is_kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        return function(*arguments)
    finally:
        torch.set_autocast_cache_enabled(is_kept)


def _flat(result: Any) -> tuple[list[Tensor], Any]:
    """Return the tensors in a result and the structure of the result. The structure is None for a single tensor."""
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
    """Return a recording, the structure of its result, and the tensors whose memory each replay replaces.

    The recording is checked: a replay must reproduce a call bit for bit. All changes to tensors and random number
    generators are undone.

    Raises:
        NotRepeatableError: the function cannot be recorded.
    """
    if before.hook is not None:
        raise NotRepeatableError(f"{before.hook} would not run in a replay")
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
            raise NotRepeatableError("replaying it does not reproduce its results")
    return recorded, structure, left


def _names_of(outside: Sequence[Tensor], reach: Reach) -> set[str]:
    """Return the names by which a function refers to the tensors in `outside`, which it reads but did not create."""
    names = set()
    for tensor in outside:
        name = reach.name_of(tensor)
        if name is None:
            raise NotRepeatableError(
                f"it uses a tensor {tensor.dtype} {list(tensor.shape)} that it does not refer to by its attributes, "
                "closure, defaults or globals"
            )
        names.add(name)
    return names


def _check_changes(before: Reach, after: Reach, used: set[str], made: Sequence[Tensor]) -> None:
    """Check that a call changed no reference. A tensor that the call does not read may be replaced by a new one."""
    identities = {id(tensor) for tensor in made}
    for name, words in before.changes(after):
        if name in used or not (before.is_alike(after, name) and id(after.tensors[name]) in identities):
            raise NotRepeatableError(f"a call changes an object that the function refers to: {words}")


@contextmanager
def _undone(tensors: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """On exit, undo all changes to these tensors and to torch's random number generators."""
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
"""Methods that pass tensor values to Python without calling torch's dispatcher."""


class _Borders(TorchFunctionMode):
    """Records whether a tensor value is passed to Python, and which tensors are created from Python numbers."""

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
    """While active, adds every operator call to a recording."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, overload = func._schema.name, func._schema.overload_name
        return self._recording.call(name, overload, *args, **(kwargs or {}))


def _note(recording: Recording, function: Function, arguments: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
    """Record a call of a function. Return the structure of its result, and the tensors it uses but did not create."""
    borders = _Borders()
    try:
        with borders, _Calls(recording):
            result = call(function, *arguments)
    except Exception as error:  # caused by the dispatch mode, as for torch.cond: an ordinary call has just succeeded
        raise NotRepeatableError(f"it fails while its calls are recorded: {error!r}") from error
    tensors, structure = _flat(result)
    recording.returns(tensors)
    del tensors, result
    recording.stop()
    if reader := recording.unrepeatable or borders.exit:
        raise NotRepeatableError(f"it reads tensor values, by {reader}, which a replay cannot repeat")
    constants = set(map(id, borders.constants))
    return structure, [tensor for tensor in recording.outside if id(tensor) not in constants]


def _repeat(
    function: Function, arguments: Sequence[Tensor], touched: Sequence[Tensor]
) -> tuple[_Recorded, Sequence[Tensor]]:
    """Record the operator calls of a function."""
    recording = Recording(arguments)
    with _undone(touched, arguments[0].device):
        _note(recording, function, arguments)
        recording.undo()  # frees the recording's saved copies
    return recording, recording.left_behind


# ---- on a GPU --------------------------------------------------------------------------------------------------------


class _Captured:
    """A CUDA graph of a function's kernels, with static memory for the arguments and results."""

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
            with torch.cuda.graph(self._graph, stream=side):  # torch's default capture stream is on the first device
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
    """Record the kernels that a function launches. Each replay writes to the same memory, so no tensor is moved."""
    with _undone(touched, arguments[0].device):
        return _Captured(function, arguments), ()


_RECORD_ON: dict[str, Callable[..., tuple[_Recorded, Sequence[Tensor]]]] = {"cuda": _capture}
"""The recorder of each device type. Device types not listed here are recorded operator by operator, by `_repeat`."""
