"""Check the arguments of operators as the real kernels do, with the same error messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def check_devices(op: str, named: Mapping[str, Any]) -> None:
    tensors = {
        name if isinstance(value, Tensor) else f"{name}[{index}]": tensor
        for name, value in named.items()
        for index, tensor in enumerate(value if isinstance(value, list | tuple) else [value])
        if isinstance(tensor, Tensor)
    }
    (first, tensor), *others = tensors.items()
    for name, other in others:
        if other.device != tensor.device:
            raise ValueError(f"{op}: expected {name} on {tensor.device}, the device of {first}, got {other.device}")


_FLOATING = {"mu", "logvar", "prior_mu", "prior_logvar", "z", "logits", "h", "weight", "bias", "sample_weight"}
_HALF_OR_MORE = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def _name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as the real kernels print it in error messages."""
    return torch.empty((), dtype=dtype, device="cpu").type().rpartition(".")[-1].removesuffix("Tensor")


def _is_observed(dtype: torch.dtype) -> bool:
    return dtype in (torch.bool, torch.uint8) or dtype.is_floating_point


def check_values(op: str, named: Mapping[str, Any]) -> None:
    """Check each argument separately, without comparing it with other arguments."""
    for name, value in named.items():
        if name in _FLOATING and isinstance(value, Tensor) and value.dtype not in _HALF_OR_MORE:
            raise TypeError(
                f"{op}: expected {name} to be float64, float32, bfloat16 or float16, got {_name(value.dtype)}"
            )
        if name == "x" and not _is_observed(value.dtype):
            raise TypeError(f"{op}: expected x to be bool, uint8 or floating, got {_name(value.dtype)}")
        if name == "dtype" and value is not None and not _is_observed(value):
            raise TypeError(f"{op}: expected dtype to be bool, uint8 or floating, got {_name(value)}")
        if name == "key" and value.dtype != torch.int64:
            raise TypeError(f"{op}: expected key to be int64, got {_name(value.dtype)}")
        if name in ("sample_shape", "members") and any(size < 0 for size in value):
            raise ValueError(f"{op}: expected {name} to have no negative sizes, got {list(value)}")


def check_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: expected {name} to have shape {list(shape)}, got {list(tensor.shape)}")


def check_key(op: str, key: Tensor, batch: Sequence[int] = ()) -> int:
    """Check that there is one key, or one for each of the first dimensions of the batch. Return how many these are."""
    dims = key.dim() - 1
    if not 0 <= dims <= len(batch) or tuple(key.shape) != (*batch[:dims], 2):
        raise ValueError(f"{op}: expected key to have shape [2], (seed, offset), got {list(key.shape)}")
    return dims


def check_has_event(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dim() < 1:
        raise ValueError(f"{op}: expected {name} to have at least one dimension, the event, got a 0-dimensional tensor")


def check_event(op: str, **tensors: Tensor) -> tuple[int, ...]:
    """Check that the last dimensions have the same size. Return the broadcast leading dimensions."""
    (first, tensor), *others = tensors.items()
    for name, other in tensors.items():
        check_has_event(op, name, other)
    names, batch = first, tensor.shape[:-1]
    for name, other in others:
        if other.shape[-1] != tensor.shape[-1]:
            raise ValueError(
                f"{op}: expected the last dimension of {name} to be {tensor.shape[-1]}, that of {first}, "
                f"got {other.shape[-1]}"
            )
        batch = broadcast(op, names, batch, name, other.shape[:-1])
        names = f"{names} and {name}"
    return tuple(batch)


def broadcast(op: str, name: str, one: torch.Size, other_name: str, other: torch.Size) -> torch.Size:
    try:
        return torch.broadcast_shapes(one, other)
    except RuntimeError:
        raise ValueError(
            f"{op}: expected the leading dimensions of {name} and {other_name} to broadcast, "
            f"got {list(one)} and {list(other)}"
        ) from None


def check_layer(op: str, h: Tensor, weight: Tensor, bias: Tensor) -> None:
    check_has_event(op, "h", h)
    if weight.dim() != 2:
        raise ValueError(f"{op}: expected weight to have shape [D, H], got {list(weight.shape)}")
    if h.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: expected the last dimension of h to be {weight.shape[1]}, that of weight, got {h.shape[-1]}"
        )
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{op}: expected bias to have shape [{weight.shape[0]}], one for each row of weight, got {list(bias.shape)}"
        )


def check_head(op: str, h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> tuple[int, ...]:
    """Check the arguments of a Bernoulli head. Return the broadcast leading dimensions of h and x."""
    check_layer(op, h, weight, bias)
    check_has_event(op, "x", x)
    if x.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"{op}: expected the last dimension of x to be {weight.shape[0]}, the rows of weight, got {x.shape[-1]}"
        )
    return tuple(broadcast(op, "h", h.shape[:-1], "x", x.shape[:-1]))


def check_row_weights(op: str, name: str, weights: Tensor, batch: Sequence[int]) -> None:
    aligned = list(zip(reversed(weights.shape), reversed(batch), strict=False))
    if weights.dim() > len(batch) or any(size not in (1, rows) for size, rows in aligned):
        raise ValueError(f"{op}: expected {name} to broadcast to {list(batch)}, the rows, got {list(weights.shape)}")
