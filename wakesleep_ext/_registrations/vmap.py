"""The vmap rules of the operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

_ops = torch.ops.wakesleep_ext


def _batch_leading(op: Any) -> Callable[..., tuple[Tensor, int]]:
    """Return the vmap rule of a density: the batch becomes a leading dimension, over which the density broadcasts."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Tensor, int]:
        return op(*_aligned(tensors, in_dims)), 0

    return rule


def _aligned(tensors: Sequence[Tensor], in_dims: Sequence[int | None]) -> list[Tensor]:
    rank = max(tensor.dim() - (dim is not None) for tensor, dim in zip(tensors, in_dims, strict=True))
    aligned = []
    for tensor, dim in zip(tensors, in_dims, strict=True):
        if dim is not None:
            tensor = tensor.movedim(dim, 0)
            padding = (1,) * (rank - (tensor.dim() - 1))
            tensor = tensor.reshape(tensor.shape[0], *padding, *tensor.shape[1:])
        aligned.append(tensor)
    return aligned


def _one_by_one(op: Any) -> Callable[..., tuple[Any, Any]]:
    """Return a vmap rule that calls the op once per batch member.

    Each member's draw equals the draw of a separate call with the member's key.
    """

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        flat, structure = tree_flatten(arguments)
        dims, _ = tree_flatten(in_dims)

        def member(index: int) -> Any:
            selected = [
                item.select(dim, index) if isinstance(dim, int) else item for item, dim in zip(flat, dims, strict=True)
            ]
            return op(*tree_unflatten(selected, structure))

        results = [member(index) for index in range(info.batch_size)]
        stacked = tree_map(lambda *members: torch.stack(members), *results)
        return stacked, tree_map(lambda _: 0, stacked)

    return rule


@torch.library.register_vmap("wakesleep_ext::linear_bernoulli_log_prob")
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    """Treat the batch as a leading dimension, or loop over it if its members have different weights or biases."""
    operator = _ops.linear_bernoulli_log_prob.default
    h, weight, bias, x, *others = arguments
    if in_dims[1] is not None or in_dims[2] is not None:
        return _one_by_one(operator)(info, in_dims, *arguments)
    h, x = _aligned((h, x), (in_dims[0], in_dims[3]))
    return operator(h, weight, bias, x, *others), 0


@torch.library.register_vmap("wakesleep_ext::mlp")
def _(info: Any, in_dims: tuple[Any, ...], h: Tensor, *others: Any) -> tuple[Any, Any]:
    operator = _ops.mlp.default
    if any(isinstance(dim, int) for dim in tree_flatten(in_dims[1:])[0]):
        return _one_by_one(operator)(info, in_dims, h, *others)
    return operator(*_aligned((h,), in_dims[:1]), *others), 0


@torch.library.register_vmap("wakesleep_ext::draw_key")
def _(
    info: Any,
    in_dims: tuple[int | None],
    like: Tensor,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, int | None]:
    if info.randomness == "error":
        raise RuntimeError(
            "vmap: an op drew a key, but the randomness mode is 'error'. Pass randomness='different' or 'same' to "
            "vmap, or pass a key to the op"
        )
    if info.randomness == "same":
        return _ops.draw_key.default(like, generator=generator), None
    keys = [_ops.draw_key.default(like, generator=generator) for _ in range(info.batch_size)]
    return torch.stack(keys), 0


for _op in (
    _ops.gaussian_log_prob.default,
    _ops.standard_gaussian_log_prob.default,
    _ops.gaussian_kl.default,
    _ops.gaussian_kl_between.default,
    _ops.bernoulli_log_prob.default,
):
    torch.library.register_vmap(_op, _batch_leading(_op))

for _op in (
    _ops.gaussian_rsample.default,
    _ops.gaussian_rsample_log_prob.default,
    _ops.gaussian_rsample_backward.default,
    _ops.bernoulli_sample.default,
    _ops.binarize.default,
    _ops.gaussian_log_prob_backward.default,
    _ops.standard_gaussian_log_prob_backward.default,
    _ops.gaussian_kl_backward.default,
    _ops.gaussian_kl_between_backward.default,
    _ops.bernoulli_log_prob_backward.default,
    _ops.mlp_backward.default,
    _ops.linear_bernoulli_sample.default,
    _ops.linear_bernoulli_log_prob_backward.default,
):
    torch.library.register_vmap(_op, _one_by_one(_op))
