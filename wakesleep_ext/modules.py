"""Layers and heads as modules: linear layers that know what their output is for.

Each is an `nn.Linear`, with its parameters, its initialisation and its state dict, and takes the place of one that is
there already by `from_linear`, which shares the parameters; `fuse` gives all layers of a model to the ops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeGuard, TypeVar, get_args

import torch
from torch import Tensor, nn

from wakesleep_ext import ops
from wakesleep_ext.distributions import DiagonalGaussian

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BernoulliHead", "GaussianHead", "Linear", "Sequential", "fuse"]

Model = TypeVar("Model", bound=nn.Module)

_NAMES: dict[type[nn.Module], ops.Activation] = {nn.ReLU: "relu", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh"}


class _Linear(nn.Linear):
    activation: ops.Activation | None = None

    def forward(self, h: Tensor) -> Tensor:
        return ops.linear(h, self.weight, self.bias, self.activation)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """The layer that has the same parameters as `linear`, which it shares with it: what trains one trains both."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{cls.__name__}.from_linear: expected linear to be an nn.Linear, got {type(linear)}")
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)


class Linear(_Linear):
    """f(h Wᵀ + b), `[*, in_features] -> [*, out_features]`; see :func:`wakesleep_ext.ops.linear`.

    Args:
        activation: f, `"relu"`, `"sigmoid"` or `"tanh"`; None for none.

    Raises:
        ValueError: `activation` is none of these.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        activation: ops.Activation | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = _checked(activation)

    @classmethod
    def from_linear(cls, linear: nn.Linear, activation: ops.Activation | None = None) -> Self:
        """The layer that has the same parameters as `linear`, which it shares with it, and an activation besides."""
        layer = super().from_linear(linear)
        layer.activation = _checked(activation)
        return layer

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")


def _checked(activation: ops.Activation | None) -> ops.Activation | None:
    if activation not in (None, *get_args(ops.Activation)):
        raise ValueError(
            f"Linear: expected activation to be None or one of {get_args(ops.Activation)}, got {activation!r}"
        )
    return activation


class BernoulliHead(_Linear):
    """p(x|h) of independent binary variables whose logits are h Wᵀ + b, never held whole by what scores or draws them.

    Called as a module it returns the logits, as the linear layer that it is.
    """

    def log_prob(self, h: Tensor, x: Tensor, *, recompute: bool | None = None) -> Tensor:
        """Log-likelihood of each row, h `[*S, *B, H]`, x `[*B, D]`, to `[*S, *B]`; see
        :func:`wakesleep_ext.ops.linear_bernoulli_log_prob`."""
        return ops.linear_bernoulli_log_prob(h, self.weight, self.bias, x, recompute=recompute)

    def log_prob_sum(self, h: Tensor, x: Tensor, importance: Tensor | None = None) -> Tensor:
        """Their weighted sum, for training, its gradients formed in the same pass; see
        :func:`wakesleep_ext.ops.linear_bernoulli_log_prob_sum`."""
        return ops.linear_bernoulli_log_prob_sum(h, self.weight, self.bias, x, importance)

    def sample(
        self,
        h: Tensor,
        *,
        dtype: torch.dtype | None = None,
        key: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """x ~ p(x|h), `[*B, H] -> [*B, D]`; see :func:`wakesleep_ext.ops.linear_bernoulli_sample`."""
        return ops.linear_bernoulli_sample(h, self.weight, self.bias, dtype=dtype, key=key, generator=generator)


class GaussianHead(_Linear):
    """q(z|h) of a diagonal Gaussian whose packed parameters `[mu | logvar]` are h Wᵀ + b, read in place.

    Called as a module it returns the packed parameters, as the linear layer that it is.

    Raises:
        ValueError: `out_features` is odd.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if out_features % 2:
            raise ValueError(f"GaussianHead: expected out_features [mu | logvar] to be even, got {out_features}")
        super().__init__(in_features, out_features, bias, device, dtype)

    def moments(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """mu and logvar, `[*B, H] -> [*B, out_features / 2]` each, whose gradients come back packed; see
        :func:`wakesleep_ext.ops.gaussian_parameters`."""
        return ops.gaussian_parameters(self(h))

    def distribution(self, h: Tensor, validate_args: bool | None = None) -> DiagonalGaussian:
        """As a :class:`wakesleep_ext.distributions.DiagonalGaussian`."""
        return DiagonalGaussian(*self.moments(h), validate_args=validate_args)

    def rsample_log_prob(
        self,
        h: Tensor,
        sample_shape: Sequence[int] = (),
        *,
        key: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """z ~ q(z|h) `[*S, *B, K]` and log q(z|h) `[*S, *B]`; see
        :func:`wakesleep_ext.ops.gaussian_rsample_log_prob`."""
        return ops.gaussian_rsample_log_prob(*self.moments(h), sample_shape, key=key, generator=generator)

    def log_prob(self, h: Tensor, z: Tensor) -> Tensor:
        """log q(z|h), h `[*B, H]`, z `[*S, *B, K]`, to `[*S, *B]`; see :func:`wakesleep_ext.ops.gaussian_log_prob`."""
        return ops.gaussian_log_prob(*self.moments(h), z)


class Sequential(nn.Sequential):
    """As `nn.Sequential`, whose linear layers and activations are left to :func:`wakesleep_ext.ops.perceptron`, as many
    in one call as follow each other. A layer that has hooks, or is of a class of its own, is called as it stands."""

    def forward(self, input: Tensor) -> Tensor:
        return through(self, input)


def fuse(model: Model) -> Model:
    """Give a model's linear layers to :func:`wakesleep_ext.ops.perceptron`, in place; the model itself is returned.

    Every `nn.Linear` in it becomes a :class:`Linear` and every `nn.Sequential` a :class:`Sequential`, by a change of
    class alone: parameters, state dicts and hooks stay what they are. Subclasses of either are left alone.
    """
    for module in model.modules():
        fused = _FUSED.get(type(module))
        if fused is not None:
            module.__class__ = fused
    return model


_FUSED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: Linear, nn.Sequential: Sequential}


def through(modules: Iterable[nn.Module], input: Tensor) -> Tensor:
    """The modules one after the other, layers and the activations that follow them by the op."""
    waiting: list[tuple[Tensor, Tensor | None, ops.Activation | None]] = []
    for module in modules:
        if is_linear(module):
            waiting.append((module.weight, module.bias, getattr(module, "activation", None)))
        elif waiting and waiting[-1][-1] is None and (name := name_of_activation(module)):
            waiting[-1] = (*waiting[-1][:-1], name)
        else:
            input = module(_through_layers(waiting, input))
            waiting = []
    return _through_layers(waiting, input)


def _through_layers(layers: Sequence[tuple[Tensor, Tensor | None, ops.Activation | None]], input: Tensor) -> Tensor:
    """In one call, if all but the last have the same activation."""
    while layers:
        weights, biases, names = zip(*layers, strict=True)
        count = 1 + next((number for number, name in enumerate(names) if name != names[0]), len(names))
        input = ops.perceptron(input, weights[:count], biases[:count], names[0], names[:count][-1])
        layers = layers[count:]
    return input


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a layer that torch or :class:`Linear` computes, and nobody waits for what it does."""
    return type(module).forward in (nn.Linear.forward, Linear.forward) and not has_hooks(module)


def name_of_activation(module: nn.Module) -> ops.Activation | None:
    """By what name :func:`wakesleep_ext.ops.linear` does what the module does, if it can and nobody waits for it."""
    return None if has_hooks(module) else _NAMES.get(type(module))


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody waits for what the module itself is called with, or returns."""
    return any(hooks_of(module))


def hooks_of(module: nn.Module) -> tuple[Mapping[int, Callable[..., object]], ...]:
    """What is called when the module itself is, or a backward pass comes by it: always the same mappings."""
    return module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
