"""A function of tensors as a CUDA graph: what it launches is captured once, and launched as one from then on."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_WARM_UPS = 3
"""As many as `torch.cuda.make_graphed_callables` makes; libraries set themselves up in the first."""


class Replay:
    """Calls a function by replaying its CUDA graph, which the first call captures.

    Python in the function runs at the first call only: whatever is to differ from call to call must be in tensors.

    Args:
        function: launches the same kernels whatever the values of its arguments, of which there is one at least, and
            reads none of them.
        state: gives every tensor that outlasts a call and that `function` changes, always in place. The calls that warm
            it up leave no trace in them.
    """

    def __init__(self, function: Callable[..., Tensor], state: Callable[[], Iterable[Tensor]]) -> None:
        self._function = function
        self._state = state
        self._captured: tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor] | None = None

    def __call__(self, *arguments: Tensor) -> Tensor:
        """What the function returns of arguments that are like those of the first call, as a tensor of its own.

        Raises:
            ValueError: an argument has another shape or dtype than at the first call.
        """
        if self._captured is None:
            own = [argument.clone() for argument in arguments]
            with torch.cuda.device(own[0].device):
                self._warm_up(own)
                self._captured = self._capture(own)
        graph, own, result = self._captured
        for held, argument in zip(own, arguments, strict=True):
            if (held.shape, held.dtype) != (argument.shape, argument.dtype):
                expected, got = (f"{t.dtype} {list(t.shape)}" for t in (held, argument))
                raise ValueError(f"Replay: expected an argument as it was captured, {expected}, got {got}")
            held.copy_(argument)
        graph.replay()
        return result.clone()

    def _warm_up(self, arguments: list[Tensor]) -> None:
        state = list(self._state())
        before = [tensor.detach().clone() for tensor in state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    self._function(*arguments)
        finally:
            torch.cuda.current_stream().wait_stream(side)
            with torch.no_grad():
                for tensor, value in zip(state, before, strict=True):
                    tensor.copy_(value)

    def _capture(self, arguments: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self._function(*arguments)
        return graph, arguments, result
