"""Fake kernels, which compute only the shapes and dtypes of results, for torch.compile and meta tensors."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from wakesleep_ext._registrations.checks import (
    broadcast,
    check_devices,
    check_event,
    check_head,
    check_key,
    check_layer,
    check_row_weights,
    check_shape,
    check_values,
)

_ops = torch.ops.wakesleep_ext


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _promoted(*tensors: Tensor) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a fake kernel that checks its arguments as the real kernels do, before it creates the results.

    torch dispatches a call to the fake kernel if any tensor is on the meta device. The fake kernel then checks that all
    tensors are on the same device.
    """

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        parameters = tuple(inspect.signature(kernel).parameters)

        @torch.library.register_fake(f"wakesleep_ext::{name}")
        @wraps(kernel)
        def checked(*arguments: Any, **others: Any) -> Any:
            named = {**dict(zip(parameters, arguments, strict=False)), **others}
            check_devices(name, named)
            check_values(name, named)
            return kernel(*arguments, **others)

        return checked

    return register


def _rows(op: str, **tensors: Tensor) -> Tensor:
    """Return an empty tensor in the compute dtype, with the broadcast leading dimensions of the arguments."""
    shape = check_event(op, **tensors)
    return next(iter(tensors.values())).new_empty(shape, dtype=_compute_dtype(_promoted(*tensors.values())))


def _events(op: str, **tensors: Tensor) -> Tensor:
    """Return an empty tensor with the broadcast shape and the promoted dtype of the arguments."""
    first = next(iter(tensors.values()))
    shape = (*check_event(op, **tensors), first.shape[-1])
    return first.new_empty(shape, dtype=_promoted(*tensors.values()))


def _packed(op: str, mu: Tensor, logvar: Tensor) -> Tensor:
    """Return an empty [grad_mu | grad_logvar], in the broadcast shape of mu and logvar."""
    event = _events(op, mu=mu, logvar=logvar)
    return event.new_empty((*event.shape[:-1], 2 * event.shape[-1]))


@_fake("draw_key")
def _(like: Tensor, *, generator: torch.Generator | None = None, members: Sequence[int] = ()) -> Tensor:
    return like.new_empty((*members, 2), dtype=torch.int64)


def _draw_shape(op: str, key: Tensor, sample_shape: Sequence[int], batch: Sequence[int]) -> tuple[int, ...]:
    """Return the leading dimensions of a draw: those of the keys, the samples and the rest of the batch."""
    dims = check_key(op, key, batch)
    return (*batch[:dims], *sample_shape, *batch[dims:])


@_fake("gaussian_rsample")
def _(mu: Tensor, logvar: Tensor, key: Tensor, sample_shape: Sequence[int]) -> Tensor:
    op = "gaussian_rsample"
    event = _events(op, mu=mu, logvar=logvar)
    return event.new_empty((*_draw_shape(op, key, sample_shape, event.shape[:-1]), event.shape[-1]))


@_fake("gaussian_rsample_log_prob")
def _(mu: Tensor, logvar: Tensor, key: Tensor, sample_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    op = "gaussian_rsample_log_prob"
    event = _events(op, mu=mu, logvar=logvar)
    shape = _draw_shape(op, key, sample_shape, event.shape[:-1])
    return event.new_empty((*shape, event.shape[-1])), event.new_empty(shape, dtype=_compute_dtype(event.dtype))


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
    batch = _draw_shape(op, key, sample_shape, packed.shape[:-1])
    if grad_z is not None:
        check_shape(op, "grad_z", grad_z, (*batch, mu.shape[-1]))
    if grad_log_prob is not None:
        check_shape(op, "grad_log_prob", grad_log_prob, batch)
    return packed


@_fake("bernoulli_sample")
def _(logits: Tensor, key: Tensor, sample_shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    op = "bernoulli_sample"
    shape = _draw_shape(op, key, sample_shape, check_event(op, logits=logits))
    return logits.new_empty((*shape, logits.shape[-1]), dtype=dtype)


@_fake("binarize")
def _(
    grey: Tensor, key: Tensor, white: int = 255, index: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    check_key("binarize", key)
    return grey.new_empty((len(grey if index is None else index), grey.shape[1]), dtype=dtype or torch.uint8)


@_fake("gaussian_log_prob")
def _(mu: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
    return _rows("gaussian_log_prob", mu=mu, logvar=logvar, z=z)


@_fake("gaussian_log_prob_backward")
def _(grad: Tensor, mu: Tensor, logvar: Tensor, z: Tensor, with_grad_z: bool) -> tuple[Tensor, Tensor]:
    op = "gaussian_log_prob_backward"
    check_shape(op, "grad", grad, check_event(op, mu=mu, logvar=logvar, z=z))
    parameters = _packed(op, mu, logvar).to(_promoted(mu, logvar, z))
    return parameters, parameters.new_empty((*grad.shape, z.shape[-1] if with_grad_z else 0))


@_fake("gaussian_log_prob_and_gradients")
def _(
    mu: Tensor,
    logvar: Tensor,
    z: Tensor,
    sample_weight: Tensor | None,
    scale: float,
    with_grad_z: bool,
    with_log_prob: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_prob = _rows("gaussian_log_prob_sum", mu=mu, logvar=logvar, z=z)
    if sample_weight is not None:
        check_row_weights("gaussian_log_prob_sum", "sample_weight", sample_weight, log_prob.shape)
    parameters = _packed("gaussian_log_prob_sum", mu, logvar).to(_promoted(mu, logvar, z))
    grad_z = parameters.new_empty((*log_prob.shape, z.shape[-1] if with_grad_z else 0))
    return log_prob.new_empty(()), log_prob if with_log_prob else log_prob.new_empty((0,)), parameters, grad_z


@_fake("standard_gaussian_log_prob")
def _(z: Tensor) -> Tensor:
    return _rows("standard_gaussian_log_prob", z=z)


@_fake("standard_gaussian_log_prob_backward")
def _(grad: Tensor, z: Tensor) -> Tensor:
    check_shape("standard_gaussian_log_prob_backward", "grad", grad, z.shape[:-1])
    return _events("standard_gaussian_log_prob_backward", z=z)


@_fake("gaussian_kl")
def _(mu: Tensor, logvar: Tensor) -> Tensor:
    return _rows("gaussian_kl", mu=mu, logvar=logvar)


@_fake("gaussian_kl_backward")
def _(grad: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    check_shape("gaussian_kl_backward", "grad", grad, check_event("gaussian_kl_backward", mu=mu, logvar=logvar))
    return _packed("gaussian_kl_backward", mu, logvar)


def _joint_batch(op: str, mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> tuple[int, ...]:
    """Check the parameters of a Gaussian and its prior. Return the broadcast leading dimensions."""
    batch = torch.Size(check_event(op, mu=mu, logvar=logvar))
    prior_batch = torch.Size(check_event(op, prior_mu=prior_mu, prior_logvar=prior_logvar))
    joint = broadcast(op, "mu and logvar", batch, "prior_mu and prior_logvar", prior_batch)
    check_event(op, mu=mu, prior_mu=prior_mu)
    return tuple(joint)


@_fake("gaussian_kl_between")
def _(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> Tensor:
    batch = _joint_batch("gaussian_kl_between", mu, logvar, prior_mu, prior_logvar)
    return mu.new_empty(batch, dtype=_compute_dtype(_promoted(mu, logvar, prior_mu, prior_logvar)))


@_fake("gaussian_kl_between_backward")
def _(
    grad: Tensor,
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor,
    prior_logvar: Tensor,
    with_grad: bool,
    with_grad_prior: bool,
) -> tuple[Tensor, Tensor]:
    op = "gaussian_kl_between_backward"
    batch = _joint_batch(op, mu, logvar, prior_mu, prior_logvar)
    check_shape(op, "grad", grad, batch)
    prior_batch = check_event(op, prior_mu=prior_mu, prior_logvar=prior_logvar)
    like = mu.new_empty((), dtype=_promoted(mu, logvar, prior_mu, prior_logvar))
    packed = 2 * mu.shape[-1]
    return (
        like.new_empty((*batch, packed if with_grad else 0)),
        like.new_empty((*prior_batch, packed if with_grad_prior else 0)),
    )


@_fake("bernoulli_log_prob")
def _(logits: Tensor, x: Tensor) -> Tensor:
    row = _rows("bernoulli_log_prob", logits=logits, x=x)
    return row.to(_compute_dtype(logits.dtype))


@_fake("bernoulli_log_prob_backward")
def _(grad: Tensor, logits: Tensor, x: Tensor) -> Tensor:
    op = "bernoulli_log_prob_backward"
    check_shape(op, "grad", grad, check_event(op, logits=logits, x=x))
    return _events(op, logits=logits)


def _layer(op: str, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return an empty result of a linear layer, in the promoted dtype of the arguments."""
    check_layer(op, h, weight, bias)
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
    check_key("linear_bernoulli_sample", key)
    return torch.empty_like(logits, dtype=dtype)


@_fake("linear_gaussian_rsample")
def _(h: Tensor, weight: Tensor, bias: Tensor, key: Tensor, sample_shape: Sequence[int]) -> Tensor:
    op = "linear_gaussian_rsample"
    packed = _layer(op, h, weight, bias)
    if weight.shape[0] % 2 != 0:
        raise ValueError(f"{op}: expected weight to have an even number of rows, [mu | logvar], got {weight.shape[0]}")
    check_key(op, key)
    return packed.new_empty((*sample_shape, *h.shape[:-1], weight.shape[0] // 2))


@_fake("linear_bernoulli_log_prob")
def _(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, recompute: bool | None = None) -> Tensor:
    op = "linear_bernoulli_log_prob"
    logits = _layer(op, h, weight, bias)
    return logits.new_empty(check_head(op, h, weight, bias, x), dtype=_compute_dtype(logits.dtype))


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
    batch = check_head(op, h, weight, bias, x)
    check_row_weights(op, "grad", grad, batch)
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
    scale: float,
    with_grad_h: bool,
    with_grad_weight: bool,
    with_log_prob: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if sample_weight is not None:
        batch = check_head("linear_bernoulli_log_prob_sum", h, weight, bias, x)
        check_row_weights("linear_bernoulli_log_prob_sum", "sample_weight", sample_weight, batch)
    log_prob = _ops.linear_bernoulli_log_prob.default(h, weight, bias, x)
    gradients = _ops.linear_bernoulli_log_prob_backward.default(
        log_prob, h, weight, bias, x, None, with_grad_h, with_grad_weight
    )
    return log_prob.new_empty(()), log_prob if with_log_prob else log_prob.new_empty((0,)), *gradients


@_fake("advance_")
def _(counters: Sequence[Tensor], amounts: Sequence[int]) -> None:
    pass


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
