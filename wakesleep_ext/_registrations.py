"""Register the Python side of the operators: fake kernels, vmap rules and functorch support.

Kernels and first-order gradients are registered in C++. The fake kernels here tell torch.compile and meta tensors the
shapes and dtypes of results. ``torch.func.grad`` and similar transforms refuse C++ autograd functions, so each operator
also has a Python autograd.Function.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

_ops = torch.ops.wakesleep_ext


def call(op: Any, *arguments: Any) -> Any:
    """Call an operator, through its autograd.Function if a functorch transform is active."""
    return _UNDER_FUNCTORCH.get(op, op)(*arguments) if _are_functorch_transforms_active() else op(*arguments)


# ---- fake kernels ----------------------------------------------------------------------------------------------------


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _promoted(*tensors: Tensor) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a fake kernel that makes the checks of the real kernels before it creates results.

    A call is dispatched here if any of its tensors is on the meta device, so the fake kernel checks that all are.
    """

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        parameters = tuple(inspect.signature(kernel).parameters)

        @torch.library.register_fake(f"wakesleep_ext::{name}")
        @wraps(kernel)
        def checked(*arguments: Any, **others: Any) -> Any:
            named = {**dict(zip(parameters, arguments, strict=False)), **others}
            _check_devices(name, named)
            _check_values(name, named)
            return kernel(*arguments, **others)

        return checked

    return register


def _check_devices(op: str, named: Mapping[str, Any]) -> None:
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


_FLOATING = {"mu", "logvar", "z", "logits", "h", "weight", "bias", "sample_weight"}
_HALF_OR_MORE = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def _name(dtype: torch.dtype) -> str:
    """Return the dtype's name as the real kernels print it in messages."""
    return torch.empty((), dtype=dtype, device="cpu").type().rpartition(".")[-1].removesuffix("Tensor")


def _is_observed(dtype: torch.dtype) -> bool:
    return dtype in (torch.bool, torch.uint8) or dtype.is_floating_point


def _check_values(op: str, named: Mapping[str, Any]) -> None:
    """Check each argument on its own, regardless of the others."""
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
        if name == "key" and value.shape != (2,):
            raise ValueError(f"{op}: expected key to have shape [2], (seed, offset), got {list(value.shape)}")
        if name == "sample_shape" and any(size < 0 for size in value):
            raise ValueError(f"{op}: expected sample_shape to have no negative sizes, got {list(value)}")


def _check_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: expected {name} to have shape {list(shape)}, got {list(tensor.shape)}")


def _check_has_event(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dim() < 1:
        raise ValueError(f"{op}: expected {name} to have at least one dimension, the event, got a 0-dimensional tensor")


def _check_event(op: str, **tensors: Tensor) -> tuple[int, ...]:
    """Return the broadcast leading dimensions; the last one, the event, must match."""
    (first, tensor), *others = tensors.items()
    for name, other in tensors.items():
        _check_has_event(op, name, other)
    names, batch = first, tensor.shape[:-1]
    for name, other in others:
        if other.shape[-1] != tensor.shape[-1]:
            raise ValueError(
                f"{op}: expected the last dimension of {name} to be {tensor.shape[-1]}, that of {first}, "
                f"got {other.shape[-1]}"
            )
        batch = _broadcast(op, names, batch, name, other.shape[:-1])
        names = f"{names} and {name}"
    return tuple(batch)


def _broadcast(op: str, name: str, one: torch.Size, other_name: str, other: torch.Size) -> torch.Size:
    try:
        return torch.broadcast_shapes(one, other)
    except RuntimeError:
        raise ValueError(
            f"{op}: expected the leading dimensions of {name} and {other_name} to broadcast, "
            f"got {list(one)} and {list(other)}"
        ) from None


def _check_layer(op: str, h: Tensor, weight: Tensor, bias: Tensor) -> None:
    _check_has_event(op, "h", h)
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


def _check_head(op: str, h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> tuple[int, ...]:
    """Return the broadcast leading dimensions of h and x."""
    _check_layer(op, h, weight, bias)
    _check_has_event(op, "x", x)
    if x.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"{op}: expected the last dimension of x to be {weight.shape[0]}, the rows of weight, got {x.shape[-1]}"
        )
    return tuple(_broadcast(op, "h", h.shape[:-1], "x", x.shape[:-1]))


def _check_row_weights(op: str, name: str, weights: Tensor, batch: Sequence[int]) -> None:
    aligned = list(zip(reversed(weights.shape), reversed(batch), strict=False))
    if weights.dim() > len(batch) or any(size not in (1, rows) for size, rows in aligned):
        raise ValueError(f"{op}: expected {name} to broadcast to {list(batch)}, the rows, got {list(weights.shape)}")


def _rows(op: str, **tensors: Tensor) -> Tensor:
    """Return an empty result with one number per row of the broadcast batch, in the compute dtype."""
    shape = _check_event(op, **tensors)
    return next(iter(tensors.values())).new_empty(shape, dtype=_compute_dtype(_promoted(*tensors.values())))


def _events(op: str, **tensors: Tensor) -> Tensor:
    """Return an empty tensor of the arguments' broadcast shape and common dtype."""
    first = next(iter(tensors.values()))
    shape = (*_check_event(op, **tensors), first.shape[-1])
    return first.new_empty(shape, dtype=_promoted(*tensors.values()))


def _packed(op: str, mu: Tensor, logvar: Tensor) -> Tensor:
    """Return an empty [grad_mu | grad_logvar], before it is summed to the shapes of mu and logvar."""
    event = _events(op, mu=mu, logvar=logvar)
    return event.new_empty((*event.shape[:-1], 2 * event.shape[-1]))


@_fake("draw_key")
def _(like: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    return like.new_empty((2,), dtype=torch.int64)


@_fake("gaussian_rsample")
def _(mu: Tensor, logvar: Tensor, key: Tensor, sample_shape: Sequence[int]) -> Tensor:
    event = _events("gaussian_rsample", mu=mu, logvar=logvar)
    return event.new_empty((*sample_shape, *event.shape))


@_fake("gaussian_rsample_log_prob")
def _(mu: Tensor, logvar: Tensor, key: Tensor, sample_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    event = _events("gaussian_rsample_log_prob", mu=mu, logvar=logvar)
    row = event.new_empty(event.shape[:-1], dtype=_compute_dtype(event.dtype))
    return event.new_empty((*sample_shape, *event.shape)), row.new_empty((*sample_shape, *row.shape))


@_fake("gaussian_rsample_backward")
def _(
    grad_z: Tensor | None,
    grad_log_prob: Tensor | None,
    mu: Tensor,
    logvar: Tensor,
    key: Tensor,
    sample_shape: Sequence[int],
) -> Tensor:
    op = "gaussian_rsample_backward"
    packed = _packed(op, mu, logvar)
    batch = (*sample_shape, *packed.shape[:-1])
    if grad_z is not None:
        _check_shape(op, "grad_z", grad_z, (*batch, mu.shape[-1]))
    if grad_log_prob is not None:
        _check_shape(op, "grad_log_prob", grad_log_prob, batch)
    return packed


@_fake("bernoulli_sample")
def _(logits: Tensor, key: Tensor, sample_shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    _check_event("bernoulli_sample", logits=logits)
    return logits.new_empty((*sample_shape, *logits.shape), dtype=dtype)


@_fake("binarize")
def _(
    grey: Tensor, key: Tensor, white: int = 255, index: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    return grey.new_empty((len(grey if index is None else index), grey.shape[1]), dtype=dtype or torch.uint8)


@_fake("gaussian_log_prob")
def _(mu: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
    return _rows("gaussian_log_prob", mu=mu, logvar=logvar, z=z)


@_fake("gaussian_log_prob_backward")
def _(grad: Tensor, mu: Tensor, logvar: Tensor, z: Tensor, with_grad_z: bool) -> tuple[Tensor, Tensor]:
    op = "gaussian_log_prob_backward"
    _check_shape(op, "grad", grad, _check_event(op, mu=mu, logvar=logvar, z=z))
    parameters = _packed(op, mu, logvar).to(_promoted(mu, logvar, z))
    return parameters, parameters.new_empty((*grad.shape, z.shape[-1] if with_grad_z else 0))


@_fake("standard_gaussian_log_prob")
def _(z: Tensor) -> Tensor:
    return _rows("standard_gaussian_log_prob", z=z)


@_fake("standard_gaussian_log_prob_backward")
def _(grad: Tensor, z: Tensor) -> Tensor:
    _check_shape("standard_gaussian_log_prob_backward", "grad", grad, z.shape[:-1])
    return _events("standard_gaussian_log_prob_backward", z=z)


@_fake("gaussian_kl")
def _(mu: Tensor, logvar: Tensor) -> Tensor:
    return _rows("gaussian_kl", mu=mu, logvar=logvar)


@_fake("gaussian_kl_backward")
def _(grad: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    _check_shape("gaussian_kl_backward", "grad", grad, _check_event("gaussian_kl_backward", mu=mu, logvar=logvar))
    return _packed("gaussian_kl_backward", mu, logvar)


@_fake("bernoulli_log_prob")
def _(logits: Tensor, x: Tensor) -> Tensor:
    row = _rows("bernoulli_log_prob", logits=logits, x=x)
    return row.to(_compute_dtype(logits.dtype))


@_fake("bernoulli_log_prob_backward")
def _(grad: Tensor, logits: Tensor, x: Tensor) -> Tensor:
    op = "bernoulli_log_prob_backward"
    _check_shape(op, "grad", grad, _check_event(op, logits=logits, x=x))
    return _events(op, logits=logits)


def _layer(op: str, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the empty result of a linear layer, in the dtype of its parameters."""
    _check_layer(op, h, weight, bias)
    return h.new_empty((*h.shape[:-1], weight.shape[0]), dtype=_promoted(h, weight, bias))


def _layer_gradients(
    h: Tensor, weight: Tensor, bias: Tensor, batch: Sequence[int], with_grad_h: bool, with_grad_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _promoted(h, weight, bias)
    features = weight.shape[1]
    grad_h = h.new_empty((*batch, features) if with_grad_h else (0, features), dtype=dtype)
    grad_weight = weight.new_empty((weight.shape[0] if with_grad_weight else 0, features), dtype=dtype)
    return grad_h, grad_weight, torch.empty_like(bias, dtype=dtype)


@_fake("mlp")
def _(
    h: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str | None = None,
    output_activation: str | None = None,
) -> Tensor:
    return h.new_empty((*h.shape[:-1], weights[-1].shape[0]), dtype=_promoted(h, *weights, *biases))


@_fake("mlp_with_hidden")
def _(
    h: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str | None,
    output_activation: str | None,
) -> tuple[Tensor, list[Tensor]]:
    output = _ops.mlp.default(h, weights, biases)
    rows = math.prod(h.shape[:-1])
    return output, [output.new_empty((rows, weight.shape[0])) for weight in weights[:-1]]


@_fake("mlp_backward")
def _(
    grad: Tensor,
    output: Tensor,
    hidden: Sequence[Tensor],
    h: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str | None,
    output_activation: str | None,
    with_grad_h: bool,
    with_grad_weights: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    grad_h = grad.new_empty((*(h.shape[:-1] if with_grad_h else (0,)), h.shape[-1]))
    of_weights = [grad.new_empty((len(w) if with_grad_weights else 0, w.shape[1])) for w in weights]
    return grad_h, of_weights, [grad.new_empty(bias.shape) for bias in biases]


@_fake("linear_bernoulli_sample")
def _(h: Tensor, weight: Tensor, bias: Tensor, key: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    logits = _layer("linear_bernoulli_sample", h, weight, bias)
    return torch.empty_like(logits, dtype=dtype)


@_fake("linear_bernoulli_log_prob")
def _(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, recompute: bool | None = None) -> Tensor:
    op = "linear_bernoulli_log_prob"
    logits = _layer(op, h, weight, bias)
    return logits.new_empty(_check_head(op, h, weight, bias, x), dtype=_compute_dtype(logits.dtype))


@_fake("linear_bernoulli_log_prob_and_logits")
def _(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, kept_bytes: int) -> tuple[Tensor, Tensor]:
    log_prob = _ops.linear_bernoulli_log_prob.default(h, weight, bias, x)
    rows, columns = log_prob.numel(), weight.shape[0]
    kept = rows if rows * columns * log_prob.dtype.itemsize <= kept_bytes else 0
    return log_prob, log_prob.new_empty((kept, columns))


@_fake("linear_bernoulli_log_prob_backward")
def _(
    grad: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    logits: Tensor | None,
    with_grad_h: bool,
    with_grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "linear_bernoulli_log_prob_backward"
    batch = _check_head(op, h, weight, bias, x)
    _check_row_weights(op, "grad", grad, batch)
    rows, columns = math.prod(batch), weight.shape[0]
    if logits is not None and tuple(logits.shape) not in ((rows, columns), (0, columns)):
        raise ValueError(
            f"{op}: expected logits to have shape [{rows}, {columns}] or [0, {columns}], got {list(logits.shape)}"
        )
    return _layer_gradients(h, weight, bias, batch, with_grad_h, with_grad_weight)


@_fake("linear_bernoulli_log_prob_and_gradients")
def _(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    sample_weight: Tensor | None,
    with_grad_h: bool,
    with_grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if sample_weight is not None:
        batch = _check_head("linear_bernoulli_log_prob_sum", h, weight, bias, x)
        _check_row_weights("linear_bernoulli_log_prob_sum", "sample_weight", sample_weight, batch)
    log_prob = _ops.linear_bernoulli_log_prob.default(h, weight, bias, x)
    gradients = _ops.linear_bernoulli_log_prob_backward.default(
        log_prob, h, weight, bias, x, None, with_grad_h, with_grad_weight
    )
    return log_prob, *gradients


@_fake("adam_")
def _(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    pass


# ---- vmap ------------------------------------------------------------------------------------------------------------


def _batch_leading(op: Any) -> Callable[..., tuple[Tensor, int]]:
    """Return a vmap rule for densities: they broadcast over leading dimensions, so the batch becomes one more."""

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
    """Return a vmap rule that loops over the batch. Each member is drawn from its own key, as it would be alone."""

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
    """Treat the batch as more rows; loop over it only if each member has its own weight or bias."""
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
            "vmap: a key was drawn in the randomness='error' mode; pass randomness='different' or "
            "'same' to vmap, or a key to the op"
        )
    if info.randomness == "same":
        return _ops.draw_key.default(like, generator=generator), None
    keys = [_ops.draw_key.default(like, generator=generator) for _ in range(info.batch_size)]
    return torch.stack(keys), 0


for _op in (
    _ops.gaussian_log_prob.default,
    _ops.standard_gaussian_log_prob.default,
    _ops.gaussian_kl.default,
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
    _ops.bernoulli_log_prob_backward.default,
    _ops.mlp_backward.default,
    _ops.linear_bernoulli_sample.default,
    _ops.linear_bernoulli_log_prob_backward.default,
):
    torch.library.register_vmap(_op, _one_by_one(_op))


# ---- torch.func ------------------------------------------------------------------------------------------------------


def _function(
    op: Any, gradients: Callable[[Sequence[Any], Sequence[Tensor]], tuple[Tensor | None, ...]]
) -> type[torch.autograd.Function]:
    """Make an autograd.Function of an operator.

    `gradients` maps the arguments and the gradients of the results to gradients, and may be differentiated.
    """

    class Function(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return op(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_backward(*(item for item in inputs if isinstance(item, Tensor)))
            ctx.others = [item for item in inputs if not isinstance(item, Tensor)]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            found = gradients((*ctx.saved_tensors, *ctx.others), grads)
            return (*found, *(None,) * (len(ctx.saved_tensors) + len(ctx.others) - len(found)))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise NotImplementedError(
                f"{op}: forward-mode differentiation is not supported, nor are transforms that use it, such as "
                "torch.func.hessian and jacfwd; use reverse mode: torch.func.jacrev(jacrev(f)) for a Hessian"
            )

    return Function


def _sum_like(gradient: Tensor, owner: Tensor) -> Tensor:
    return gradient.sum_to_size(owner.shape)


def _gaussian_rsample(arguments: Sequence[Any], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    mu, logvar, key, sample_shape = arguments
    grad_z, grad_log_prob = (*grads, None)[:2]
    packed = _ops.gaussian_rsample_backward.default(grad_z, grad_log_prob, mu, logvar, key, sample_shape)
    return tuple(map(_sum_like, packed.chunk(2, -1), (mu, logvar)))


def _gaussian_log_prob(arguments: Sequence[Any], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    packed, grad_z = _ops.gaussian_log_prob_backward.default(grads[0], *arguments, True)
    return tuple(map(_sum_like, (*packed.chunk(2, -1), grad_z), arguments))


def _standard_gaussian_log_prob(arguments: Sequence[Any], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (_ops.standard_gaussian_log_prob_backward.default(grads[0], *arguments),)


def _gaussian_kl(arguments: Sequence[Any], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    packed = _ops.gaussian_kl_backward.default(grads[0], *arguments)
    return tuple(map(_sum_like, packed.chunk(2, -1), arguments))


def _bernoulli_log_prob(arguments: Sequence[Any], grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    logits, x = arguments
    grad_logits = _ops.bernoulli_log_prob_backward.default(grads[0], logits, x)
    grad_x = _sum_like(grads[0].unsqueeze(-1) * logits, x) if x.is_floating_point() else None
    return grad_logits, grad_x


def _mlp(
    h: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str | None,
    output_activation: str | None,
) -> Tensor:
    """Apply layer by layer, since functorch does not look into lists."""
    last = len(weights) - 1
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        h = _Layer.apply(h, weight, bias, output_activation if number == last else activation)
    return h


def _layer_op(h: Tensor, weight: Tensor, bias: Tensor, activation: str | None) -> Tensor:
    output: Tensor = _ops.mlp.default(h, [weight], [bias], None, activation)
    return output


def _layer_gradients_of(arguments: Sequence[Any], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    h, weight, bias, activation = arguments
    output: Tensor = _mlp(h, [weight], [bias], None, activation)
    grad_h, (grad_weight,), (grad_bias,) = _ops.mlp_backward.default(
        grads[0], output, [], h, [weight], [bias], None, activation, True, True
    )
    return grad_h, grad_weight, grad_bias


_Layer = _function(_layer_op, _layer_gradients_of)


def _linear_bernoulli_log_prob(arguments: Sequence[Any], grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    h, weight, bias, x, _ = arguments
    found = _ops.linear_bernoulli_log_prob_backward.default(grads[0], h, weight, bias, x, None, True, True)
    grad_x = None
    if x.is_floating_point():  # the logits are linear in h, so sum h to the shape of x before multiplying
        rows = (grads[0].unsqueeze(-1) * h).sum_to_size(*x.shape[:-1], h.shape[-1])
        grad_x = rows @ weight.mT + grads[0].sum_to_size(x.shape[:-1]).unsqueeze(-1) * bias
    return _sum_like(found[0], h), found[1], found[2], grad_x


def _linear_bernoulli_log_prob_sum(
    h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, sample_weight: Tensor | None
) -> Tensor:
    log_prob: Tensor = call(_ops.linear_bernoulli_log_prob.default, h, weight, bias, x, None)
    return (log_prob if sample_weight is None else sample_weight * log_prob).sum()


_UNDER_FUNCTORCH: dict[Any, Callable[..., Any]] = {
    op: _function(op, gradients).apply
    for op, gradients in {
        _ops.gaussian_rsample.default: _gaussian_rsample,
        _ops.gaussian_rsample_log_prob.default: _gaussian_rsample,
        _ops.gaussian_log_prob.default: _gaussian_log_prob,
        _ops.standard_gaussian_log_prob.default: _standard_gaussian_log_prob,
        _ops.gaussian_kl.default: _gaussian_kl,
        _ops.bernoulli_log_prob.default: _bernoulli_log_prob,
        _ops.linear_bernoulli_log_prob.default: _linear_bernoulli_log_prob,
    }.items()
}
_UNDER_FUNCTORCH[_ops.gaussian_parameters.default] = lambda packed: packed.chunk(2, -1)
_UNDER_FUNCTORCH[_ops.mlp.default] = _mlp
_UNDER_FUNCTORCH[_ops.linear_bernoulli_log_prob_sum.default] = _linear_bernoulli_log_prob_sum
