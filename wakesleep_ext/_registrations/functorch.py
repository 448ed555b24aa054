"""Python autograd functions of the operators, for functorch transforms.

``torch.func.grad`` and similar transforms reject C++ autograd functions. So each operator also has an autograd function
in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active

_ops = torch.ops.wakesleep_ext


def call(op: Any, *arguments: Any) -> Any:
    """Call an operator. If a functorch transform is active, call the operator's Python autograd function instead."""
    return _UNDER_FUNCTORCH.get(op, op)(*arguments) if _are_functorch_transforms_active() else op(*arguments)


def _function(
    op: Any, gradients: Callable[[Sequence[Any], Sequence[Tensor]], tuple[Tensor | None, ...]]
) -> type[torch.autograd.Function]:
    """Return an autograd.Function that calls an operator.

    Args:
        op: the operator.
        gradients: differentiable function that maps (arguments, gradients of the results) to the gradients of the first
            arguments. The other arguments get no gradient.
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
                f"{op}: forward-mode differentiation is not supported, so torch.func.jacfwd and hessian fail. Use "
                "torch.func.jacrev instead, and torch.func.jacrev(jacrev(f)) for a Hessian"
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


def _gaussian_kl_between(arguments: Sequence[Any], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    packed, packed_prior = _ops.gaussian_kl_between_backward.default(grads[0], *arguments, True, True)
    return tuple(map(_sum_like, (*packed.chunk(2, -1), *packed_prior.chunk(2, -1)), arguments))


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
    """Call the operator once per layer, because functorch does not differentiate tensors inside lists."""
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
    if x.is_floating_point():  # logits are linear in h: reduce h to the rows of x before the GEMM
        rows = (grads[0].unsqueeze(-1) * h).sum_to_size(*x.shape[:-1], h.shape[-1])
        grad_x = rows @ weight.mT + grads[0].sum_to_size(x.shape[:-1]).unsqueeze(-1) * bias
    return _sum_like(found[0], h), found[1], found[2], grad_x


def _linear_bernoulli_log_prob_sum(
    h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, sample_weight: Tensor | None, scale: float
) -> Tensor:
    log_prob: Tensor = call(_ops.linear_bernoulli_log_prob.default, h, weight, bias, x, None)
    return scale * (log_prob if sample_weight is None else sample_weight * log_prob).sum()


def _gaussian_log_prob_sum(mu: Tensor, logvar: Tensor, z: Tensor, sample_weight: Tensor | None, scale: float) -> Tensor:
    log_prob: Tensor = call(_ops.gaussian_log_prob.default, mu, logvar, z)
    return scale * (log_prob if sample_weight is None else sample_weight * log_prob).sum()


_UNDER_FUNCTORCH: dict[Any, Callable[..., Any]] = {
    op: _function(op, gradients).apply
    for op, gradients in {
        _ops.gaussian_rsample.default: _gaussian_rsample,
        _ops.gaussian_rsample_log_prob.default: _gaussian_rsample,
        _ops.gaussian_log_prob.default: _gaussian_log_prob,
        _ops.standard_gaussian_log_prob.default: _standard_gaussian_log_prob,
        _ops.gaussian_kl.default: _gaussian_kl,
        _ops.gaussian_kl_between.default: _gaussian_kl_between,
        _ops.bernoulli_log_prob.default: _bernoulli_log_prob,
        _ops.linear_bernoulli_log_prob.default: _linear_bernoulli_log_prob,
    }.items()
}
_UNDER_FUNCTORCH[_ops.gaussian_parameters.default] = lambda packed: packed.chunk(2, -1)
_UNDER_FUNCTORCH[_ops.mlp.default] = _mlp
_UNDER_FUNCTORCH[_ops.linear_bernoulli_log_prob_sum.default] = _linear_bernoulli_log_prob_sum
_UNDER_FUNCTORCH[_ops.gaussian_log_prob_sum.default] = _gaussian_log_prob_sum
