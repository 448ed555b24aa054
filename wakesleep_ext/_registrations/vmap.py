"""The vmap rule of `draw_key`, which needs the randomness mode of vmap. All other rules are in csrc/autograd/vmap.cpp.

`torch.library.register_vmap` would take 60 us for each draw under `vmap(grad(f))`, as long as eight operators of torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard, _functorch

_draw_key = torch.ops.wakesleep_ext.draw_key.default
_library = torch.library.Library("wakesleep_ext", "IMPL")
_batched = DispatchKeySet(DispatchKey.FuncTorchBatched)


def _draw_key_of_batch(
    like: Tensor, *, generator: torch.Generator | None = None, members: Sequence[int] = ()
) -> Tensor:
    interpreter = _functorch.peek_interpreter_stack()  # `level` is a pointer to it
    level = _functorch.CVmapInterpreterPtr(interpreter)
    mode = level.randomness()
    if mode == _functorch.RandomnessType.Error:
        raise RuntimeError(
            "vmap: an op drew a key, but the randomness mode is 'error'. Pass randomness='different' or 'same' to "
            "vmap, or pass a key to the op"
        )
    is_member = _functorch.maybe_get_level(like) == level.level()
    value = _functorch.get_unwrapped(like) if is_member else like
    with _ExcludeDispatchKeyGuard(_batched):
        if mode == _functorch.RandomnessType.Same:
            return _draw_key(value, generator=generator, members=members)
        keys = _draw_key(value, generator=generator, members=[level.batchSize(), *members])
    return _functorch._add_batch_dim(keys, 0, level.level())


_library.impl("draw_key", _draw_key_of_batch, "FuncTorchBatched")
