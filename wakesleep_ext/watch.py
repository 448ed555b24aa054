"""Check that everything a recorded function depends on is unchanged.

A replay repeats the operator calls of a recording, but does not run the Python code that made these calls. So a
recording is valid only while the inputs of that code stay the same: the set of tensors and their addresses, numbers
such as a learning rate, and torch's modes.

:class:`Reach` finds these inputs by following the function's references: its bound object, closure and defaults, the
arguments of a `functools.partial`, and the globals that its code names. From these objects, it follows attributes,
dicts, lists and tuples. Reach does not look into Python modules, classes, the globals of other files, ``__slots__``,
sets, deques or NumPy arrays.
"""

from __future__ import annotations

import dis
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.optim import optimizer as optimizers

from wakesleep_ext._C import Watch

_HOOKS_OF_ALL = {
    f"{owner.__name__}.{name}": hooks
    for owner in (modules, optimizers)
    for name, hooks in vars(owner).items()
    if name.startswith("_global_") and isinstance(hooks, dict)
}
"""Global hooks, which torch calls for every module or every optimizer."""

_VALUES = (bool, int, float, complex, str, bytes, type(None))
_CLOSED = (ModuleType, type, BuiltinFunctionType, CodeType)


_NOT_LOOKED_INTO = ("state_dict_hooks", "dict_pre_hooks", "dict_post_hooks", "_with_kwargs", "_always_called")
"""Skipped attributes of modules and optimizers: state dict hooks, which no call runs, and flags of other hooks."""


class Unwatched:
    """A base class that excludes its instances from a watch: changes inside them do not invalidate a recording."""


class Reach:
    """A snapshot of everything a function refers to.

    Attributes:
        tensors: the tensors found, keyed by Python expression.
        buffers: the buffers of the modules found.
        hook: the name of a hook or a distributed wrapper, which would not run in a replay; None if there is none.
        places: containers and their contents, for :class:`wakesleep_ext._C.Watch`.
    """

    def __init__(self, function: Any) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.buffers: list[Tensor] = []
        self.hook: str | None = None
        self.places: list[tuple[Any, ...]] = []
        self._facts: dict[str, Any] = {}
        self._grads: list[tuple[Tensor, Tensor | None]] = []
        self._globals = _file_of(function)
        self._entered: dict[int, Any] = {}  # keeps the objects alive so that their ids are not reused
        waiting: deque[tuple[str, Any]] = deque([("", function), *_HOOKS_OF_ALL.items()])
        while waiting:
            waiting.extend(self._enter(*waiting.popleft()))

    def _enter(self, name: str, item: Any) -> Iterable[tuple[str, Any]]:
        """Record an object, and return the names and values of its references."""
        self._facts[name] = _fact(item)
        if isinstance(item, _VALUES) or id(item) in self._entered:
            return ()
        self._entered[id(item)] = item
        if isinstance(item, Tensor):
            return self._of_tensor(name, item)
        if isinstance(item, dict):
            return self._of_dict(name, item)
        if isinstance(item, list | tuple):
            if isinstance(item, list):
                self.places.append((item, *item))
            return ((f"{name}[{number}]", value) for number, value in enumerate(item))
        if isinstance(item, partial):
            return (name, item.func), (_join(name, "args"), item.args), (_join(name, "keywords"), item.keywords)
        if isinstance(item, MethodType):
            return (_join(name, "self"), item.__self__), (name, item.__func__)
        if isinstance(item, FunctionType):
            return self._of_function(name, item)
        if isinstance(item, (*_CLOSED, Unwatched)) or type(item).__module__.startswith("torch._"):
            return ()
        return self._of_instance(name, item)

    def _of_tensor(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Any]]:
        self.tensors[name] = tensor
        yield f"{name}._backward_hooks", tensor._backward_hooks
        yield f"{name}._post_accumulate_grad_hooks", tensor._post_accumulate_grad_hooks
        if tensor.is_leaf and tensor.requires_grad:
            self._grads.append((tensor, tensor.grad))
            yield f"{name}.grad", tensor.grad

    def _of_dict(self, name: str, item: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
        pairs = list(dict.items(item))
        self.places.append((item, *(part for pair in pairs for part in pair)))
        last = name.rpartition(".")[-1]
        if last.endswith("_hooks"):
            if pairs:
                self.hook = name
            return
        for number, (key, value) in enumerate(pairs):
            yield f"{name}[{repr(key) if isinstance(key, _VALUES) else f'{type(key).__name__} {number}'}]", value

    def _of_function(self, name: str, function: FunctionType) -> Iterator[tuple[str, Any]]:
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # the variable has no value yet
                continue
            self.places.append((cell, content))
            yield _join(name, variable), content
        yield _join(name, "__defaults__"), function.__defaults__
        yield _join(name, "__kwdefaults__"), function.__kwdefaults__
        if function.__globals__ is self._globals:
            for variable in sorted(_globals_in(function.__code__) & self._globals.keys()):
                self.places.append((variable, self._globals, self._globals[variable]))
                yield variable, self._globals[variable]

    def _of_instance(self, name: str, item: Any) -> Iterator[tuple[str, Any]]:
        attributes = getattr(item, "__dict__", None)
        if type(attributes) is not dict:
            return
        if type(item).__module__.startswith(("torch.distributed.", "torch.nn.parallel.")):
            self.hook = f"{name}, a {type(item).__name__}"
        if isinstance(item, nn.Module):
            self.buffers += [buffer for buffer in item._buffers.values() if buffer is not None]
        self.places.append((item,))
        self.places.append((attributes, *(part for pair in attributes.items() for part in pair)))
        for key, value in attributes.items():
            if not (isinstance(item, nn.Module | optimizers.Optimizer) and key.endswith(_NOT_LOOKED_INTO)):
                yield _join(name, key), value

    def restore(self) -> None:
        """Restore every reference to its value at the time of the snapshot."""
        for container, *contents in self.places:
            if isinstance(container, str):
                contents[0][container] = contents[1]
            elif isinstance(container, dict):
                pairs = list(zip(contents[::2], contents[1::2], strict=True))
                if [part for pair in dict.items(container) for part in map(id, pair)] != list(map(id, contents)):
                    dict.clear(container)
                    dict.update(container, pairs)
            elif isinstance(container, list):
                container[:] = contents
            elif isinstance(container, CellType):
                container.cell_contents = contents[0]
        for tensor, grad in self._grads:
            if tensor.grad is not grad:
                tensor.grad = grad

    def name_of(self, tensor: Tensor) -> str | None:
        """Return the name of this tensor, or of a tensor that shares its memory; None if neither was found."""
        memory = _memory(tensor)
        for name, own in self.tensors.items():
            if own is tensor or (memory is not None and _memory(own) == memory):
                return name
        return None

    def changes(self, later: Reach) -> Iterator[tuple[str, str]]:
        """Yield each name that has changed in a later snapshot of the same function, and describe the change."""
        for name in {**self._facts, **later._facts}:
            before, now = self._facts.get(name), later._facts.get(name)
            if before != now:
                yield name, f"{name or 'the function'} changed from {_words(before)} to {_words(now)}"

    def is_alike(self, later: Reach, name: str) -> bool:
        """True if the name refers to a tensor of the same shape and dtype in both snapshots."""
        before, now = self.tensors.get(name), later.tensors.get(name)
        return before is not None and now is not None and (before.shape, before.dtype) == (now.shape, now.dtype)


class _TensorFact(NamedTuple):
    identity: int
    memory: int | None
    start: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    requires_grad: bool


def _fact(item: Any) -> Any:
    if isinstance(item, _VALUES):
        return type(item), item
    if not isinstance(item, Tensor):
        return id(item), type(item)
    is_strided = _memory(item) is not None
    start, stride = (item.data_ptr(), item.stride()) if is_strided else (0, ())
    return _TensorFact(id(item), _memory(item), start, item.dtype, item.shape, stride, item.requires_grad)


def _words(fact: Any) -> str:
    if fact is None:
        return "nothing"
    if isinstance(fact, _TensorFact):
        grad = ", which requires a gradient" * fact.requires_grad
        return f"a tensor {fact.dtype} {list(fact.shape)} at {fact.start:#x}{grad}"
    first, second = fact
    return repr(second) if first in _VALUES else f"a {second.__name__} at {first:#x}"


def _join(name: str, attribute: str) -> str:
    return f"{name}.{attribute}" if name else attribute


def _file_of(function: Any) -> dict[str, Any]:
    """Return the globals of the file that defines a function."""
    while isinstance(function, partial | MethodType):
        function = function.func if isinstance(function, partial) else function.__func__
    return getattr(function, "__globals__", {})


def _globals_in(code: CodeType) -> set[str]:
    names = {instruction.argval for instruction in dis.get_instructions(code) if instruction.opname == "LOAD_GLOBAL"}
    return names.union(*(_globals_in(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _memory(tensor: Tensor) -> int | None:
    """Return an identifier of the tensor's storage. None for meta, nested and non-strided tensors."""
    is_plain = tensor.layout == torch.strided and not tensor.is_nested and tensor.device.type != "meta"
    return tensor.untyped_storage()._cdata if is_plain else None


class Conditions:
    """The conditions of a valid recording: the function refers to the same objects, and torch's modes are unchanged.

    Args:
        function: the recorded function.
        reach: a snapshot of everything the function refers to.
        moving: tensors in the snapshot that a call may replace or move to other memory.
    """

    def __init__(self, function: Any, reach: Reach, moving: Iterable[Tensor] = ()) -> None:
        self._function, self._reach = function, reach
        self._moving = {id(tensor) for tensor in moving}
        staying = [tensor for tensor in reach.tensors.values() if not self._moves(tensor) and not tensor.is_nested]
        self._places = tuple(reach.places)  # keeps the places alive, because a Watch does not
        self.watch = Watch(staying, self._places)

    def _moves(self, tensor: Tensor | None) -> bool:
        return id(tensor) in self._moving

    def change(self) -> str:
        """Describe the condition that no longer holds."""
        for name, words in self._reach.changes(Reach(self._function)):
            if not self._moves(self._reach.tensors.get(name)):
                return words
        return "a mode of torch changed: autocast, gradients, inference, determinism, matmul precision or default dtype"
