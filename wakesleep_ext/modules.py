"""Layers and heads as modules: linear layers that know what their output is for.

Each is an `nn.Linear`, with its parameters, its initialisation and its state dict, and takes the place of one that is
there already by `from_linear`, which shares the parameters; `fuse` gives the layers of a model to the ops.

The ops stand in for plain layers only: see :func:`is_plain` and :func:`is_plain_tensor`. Any other layer is called.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeGuard, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules import module as _globals

from wakesleep_ext import ops
from wakesleep_ext.densities import Gaussian, LinearBernoulli

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BernoulliHead", "GaussianHead", "Linear", "Sequential", "fuse"]

Model = TypeVar("Model", bound=nn.Module)


class _Linear(nn.Linear):
    activation: ops.Activation | None = None

    def forward(self, h: Tensor) -> Tensor:
        if is_plain_input(h) and has_plain_parameters(self):
            parameters = self._parameters  # attributes of a module take longer to find
            return ops.linear(h, parameters["weight"], parameters["bias"], self.activation)  # type: ignore[arg-type]
        output = F.linear(h, self.weight, self.bias)
        return getattr(torch, self.activation)(output) if self.activation else output

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
    """p(x|h) of independent binary variables whose logits are h Wᵀ + b.

    Called as a module it returns the logits, as the linear layer that it is.
    """

    def distribution(self, h: Tensor) -> LinearBernoulli:
        """p(x|h), `[*B, H]` to a distribution of `[*B, D]` that draws and scores without holding the logits whole."""
        return LinearBernoulli(h, self.weight, self.bias)


class GaussianHead(_Linear):
    """q(z|h) of a diagonal Gaussian whose packed parameters `[mu | logvar]` are h Wᵀ + b.

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

    def distribution(self, h: Tensor) -> Gaussian:
        """q(z|h), `[*B, H]` to a distribution of `[*B, out_features / 2]` that reads the parameters in place."""
        return Gaussian.from_packed(self(h))


class Sequential(nn.Sequential):
    """As `nn.Sequential`, but :func:`wakesleep_ext.ops.mlp` computes linear layers and their activations.

    Layers that follow each other are one call. A layer is called itself if it is not plain: it has hooks or a `forward`
    of its own, global module hooks are registered, it is of another class, or its parameters are of a tensor subclass.
    So is a layer whose input is sparse, nested or of a tensor subclass. On a CPU, so is a single layer without
    activation, which torch computes faster.
    """

    def forward(self, input: Tensor) -> Tensor:
        return through(self, input)


def fuse(model: Model) -> Model:
    """Give a model's linear layers to :func:`wakesleep_ext.ops.mlp`, in place; the model itself is returned.

    Every `nn.Sequential` in it becomes a :class:`Sequential`, by a change of class alone. Everything else stays what it
    is: the layers and their classes, by which tools such as `quantize_dynamic` find them, parameters, state dicts and
    hooks. Subclasses of `nn.Sequential` are left alone, and so are layers outside of one.
    """
    for module in model.modules():
        if type(module) is nn.Sequential:
            module.__class__ = Sequential
    return model


def through(modules: Iterable[nn.Module], input: Tensor) -> Tensor:
    """The modules one after the other, plain layers and the activations that follow them by the op."""
    layers: list[nn.Module] = []
    names: list[ops.Activation | None] = []
    for module in modules:
        if is_linear(module) and (layers or is_plain_input(input)):
            layers.append(module)
            names.append(activation_of(module))
        elif layers and names[-1] is None and is_plain(module) and type(module) in _NAMES:
            names[-1] = _NAMES[type(module)]
        else:
            input = module(_through_layers(layers, names, input))
            layers, names = [], []
    return _through_layers(layers, names, input)


def _through_layers(layers: list[nn.Module], names: list[ops.Activation | None], input: Tensor) -> Tensor:
    """In one call, if all but the last have the same activation."""
    while layers:
        count = 1 + next((number for number, name in enumerate(names) if name != names[0]), len(names))
        if len(layers) == 1 and names[0] is None and input.is_cpu:
            return layers[0](input)
        weights = [layer._parameters["weight"] for layer in layers[:count]]
        biases = [layer._parameters["bias"] for layer in layers[:count]]
        input = ops.mlp(input, weights, biases, names[0], names[:count][-1])  # type: ignore[arg-type]
        layers, names = layers[count:], names[count:]
    return input


def is_plain(module: nn.Module) -> bool:
    """Whether the module is of a class that the ops stand in for, not of a subclass, and a call runs nothing else."""
    kind = type(module)
    return kind in _FORWARDS and kind.forward is _FORWARDS[kind] and runs_forward_only(module)


def runs_forward_only(module: nn.Module) -> bool:
    """Whether a call of the module runs the `forward` of its class alone: the instance has none and is not compiled,
    and there are no hooks, of its own or of all modules."""
    return not (
        "forward" in module.__dict__
        or module._compiled_call_impl
        or module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or _globals._has_any_global_hook()
    )


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a plain linear layer, which an op may compute."""
    return type(module) not in _NAMES and is_plain(module) and has_plain_parameters(module)


def is_plain_tensor(tensor: object) -> TypeGuard[Tensor]:
    """Whether the ops take the tensor: of torch's own classes, whose `F.linear` is torch's, strided and not nested."""
    return type(tensor) in _TENSORS and tensor.layout == torch.strided and not tensor.is_nested  # type: ignore[attr-defined]


def is_plain_input(input: object) -> TypeGuard[Tensor]:
    """Whether the ops take the tensor as an input: their devices are few, and they have no forward-mode derivatives."""
    return is_plain_tensor(input) and (input.is_cpu or input.is_cuda or input.is_meta) and forward_ad._current_level < 0


def has_plain_parameters(layer: nn.Module) -> bool:
    """Whether the ops take a linear layer's weight and bias."""
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias", _ABSENT)
    return is_plain_tensor(weight) and weight.is_floating_point() and (bias is None or is_plain_tensor(bias))


def activation_of(layer: nn.Module) -> ops.Activation | None:
    """The activation that a plain linear layer applies itself."""
    return layer.activation if isinstance(layer, _Linear) else None


_NAMES: dict[type[nn.Module], ops.Activation] = {nn.ReLU: "relu", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh"}
_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, Linear, BernoulliHead, GaussianHead, *_NAMES)
_FORWARDS = {kind: kind.forward for kind in _KINDS}
_TENSORS = {Tensor, nn.Parameter, FakeTensor, FunctionalTensor}  # the last two stand for the others in a trace
_ABSENT = object()
