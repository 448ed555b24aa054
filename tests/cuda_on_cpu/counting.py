"""Lists the kernels that a function would launch on a GPU, with the emulated CUDA kernels in place of the CPU's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from emulation import launches
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

_GEMMS = {"aten::mm", "aten::addmm"}
_ONE_KERNEL = {"aten::_foreach_add_", "aten::_foreach_mul", "aten::_foreach_mul_", "aten::sum"}
"""Torch operators that a GPU computes in one kernel and a CPU in several operators."""
_NO_KERNEL = {
    "aten::_reshape_alias",
    "aten::alias",
    "aten::as_strided",
    "aten::chunk",
    "aten::contiguous",
    "aten::detach",
    "aten::detach_",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::expand",
    "aten::item",
    "aten::lift_fresh",
    "aten::narrow",
    "aten::permute",
    "aten::promote_types",
    "aten::reshape",
    "aten::resize_",
    "aten::resolve_conj",
    "aten::result_type",
    "aten::select",
    "aten::set_",
    "aten::slice",
    "aten::split",
    "aten::squeeze",
    "aten::t",
    "aten::to",
    "aten::transpose",
    "aten::unbind",
    "aten::unsqueeze",
    "aten::view",
    "aten::view_as",
}
"""Torch operators that only allocate memory or return a view."""
_OWN = "wakesleep_ext::"


class _Launches(TorchDispatchMode):
    """Notes how many kernels each operator of the package launches.

    While a dispatch mode is active, the package reads no tensor values, as on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.of_calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = launches()
        result = func(*args, **(kwargs or {}))
        if func.namespace == "wakesleep_ext":
            self.of_calls.append((func._schema.name, launches() - before))
        return result


def kernels_of(function: Callable[[], Any]) -> list[str]:
    """Returns a name for every kernel that a call of `function` would launch on a GPU, in order.

    The name is that of the operator. If the package's operator calls a torch operator, the name contains both. GEMMs of
    the BLAS have names that start with "GEMM".
    """
    own = _Launches()
    before = launches()
    with profile(activities=[ProfilerActivity.CPU]) as profiled, own:
        function()
    total = launches() - before
    assert sum(count for _, count in own.of_calls) == total, "a kernel was launched outside an operator"
    calls = own.of_calls[::-1]
    roots = sorted((event for event in profiled.events() if event.cpu_parent is None), key=_start)
    names = [name for event in roots for name in _names(event, calls)]
    assert not calls, "the profiler missed a call"
    return names


def _start(event: Any) -> int:
    return int(event.time_range.start)


def _names(event: Any, calls: list[tuple[str, int]], within: str = "") -> Iterator[str]:
    """Yields the names of the kernels of a profiled event, and removes its calls of the package's operators."""
    inner = sorted(event.cpu_children, key=_start)
    # an operator has an event in the dispatch mode and one below it, and a composite one has neither
    if calls and event.name == calls[-1][0] and not any(child.name == event.name for child in inner):
        within = event.name.removeprefix(_OWN)
        yield from [within] * calls.pop()[1]
    if event.name in _ONE_KERNEL or (_may_launch(event) and not any(map(_launches, inner))):
        name = event.name.removeprefix("aten::")
        yield ("GEMM " if event.name in _GEMMS else "") + (f"{name} of {within}" if within else name)
        return
    for child in inner:
        yield from _names(child, calls, within)


def _may_launch(event: Any) -> bool:
    return event.name.startswith("aten::") and event.name not in _NO_KERNEL


def _launches(event: Any) -> bool:
    """True if an operator, or a part of it, launches a kernel."""
    return _may_launch(event) or any(map(_launches, event.cpu_children))
