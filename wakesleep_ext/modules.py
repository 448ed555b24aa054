"""Linear layers with a fused activation, and heads that parameterise a distribution, as modules.

Each class is an `nn.Linear` with the same parameters, initialisation and state dict. `from_linear` wraps an existing
layer and shares its parameters. `fuse` makes the fused ops compute the linear layers of a whole model.

The ops replace only plain layers: see :func:`is_plain` and :func:`is_plain_tensor`. All other layers are called as
usual.
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
            parameters = self._parameters  # faster than attribute access on a module
            return ops.linear(h, parameters["weight"], parameters["bias"], self.activation)  # type: ignore[arg-type]
        output = F.linear(h, self.weight, self.bias)
        return getattr(torch, self.activation)(output) if self.activation else output

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """Return a layer that shares the parameters of `linear`: training one trains both."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{cls.__name__}.from_linear: expected linear to be an nn.Linear, got {type(linear)}")
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)


class Linear(_Linear):
    """Computes f(h Wᵀ + b), `[*, in_features] -> [*, out_features]`; see :func:`wakesleep_ext.ops.linear`.

    Args:
        activation: f, `"relu"`, `"sigmoid"` or `"tanh"`; None for the identity.

    Raises:
        ValueError: `activation` is none of the above.
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
        """Return a layer that shares the parameters of `linear` and applies an activation."""
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
    """Parameterises p(x|h): independent Bernoulli variables with logits h Wᵀ + b.

    Calling the module returns the logits, as for any linear layer.
    """

    def distribution(self, h: Tensor) -> LinearBernoulli:
        """Return p(x|h), x `[*B, D]`, h `[*B, H]`; the fused ops draw samples and compute log-probabilities."""
        return LinearBernoulli(h, self.weight, self.bias)


class GaussianHead(_Linear):
    """Parameterises q(z|h): a diagonal Gaussian with packed parameters `[mu | logvar]` = h Wᵀ + b.

    Calling the module returns the packed parameters, as for any linear layer.

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
        """Return q(z|h), z `[*B, out_features / 2]`, h `[*B, H]`. mu and logvar are views of the packed output."""
        return Gaussian.from_packed(self(h))


class Sequential(nn.Sequential):
    """An `nn.Sequential` whose linear layers and activations are computed by :func:`wakesleep_ext.ops.mlp`.

    One call computes several consecutive layers. The following layers are called as ordinary modules instead:

    - layers of any other class, and layers that have hooks or a `forward` of their own;
    - all layers while global module hooks are registered;
    - layers whose parameters are a tensor subclass, or whose input is sparse, nested or a tensor subclass;
    - on a CPU, a single layer without an activation, which torch computes faster.
    """

    def forward(self, input: Tensor) -> Tensor:
        return through(self, input)


def fuse(model: Model) -> Model:
    """Modify a model in place so that :func:`wakesleep_ext.ops.mlp` computes its linear layers, and return the model.

    The class of every `nn.Sequential` in the model is changed to :class:`Sequential`. Layers, parameters, state dicts
    and hooks stay the same, so tools such as `quantize_dynamic` still find layers by their class. Subclasses of
    `nn.Sequential` are not changed, nor are layers outside an `nn.Sequential`.
    """
    for module in model.modules():
        if type(module) is nn.Sequential:
            module.__class__ = Sequential
    return model


def through(modules: Iterable[nn.Module], input: Tensor) -> Tensor:
    """Apply the modules in order. The op computes plain layers and the activations that follow them."""
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
    """Apply plain layers in as few calls as possible.

    All layers that run in one call must use the same activation, except the last.
    """
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
    """True if the ops implement exactly the module's class, and calling the module runs no other code."""
    kind = type(module)
    return kind in _FORWARDS and kind.forward is _FORWARDS[kind] and runs_forward_only(module)


def runs_forward_only(module: nn.Module) -> bool:
    """True if calling the module runs only the `forward` of its class.

    This requires that the instance has no `forward` of its own, is not compiled and has no hooks, and that no global
    module hooks are registered.
    """
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
    """True if the module is a plain linear layer, which an op can compute."""
    return type(module) not in _NAMES and is_plain(module) and has_plain_parameters(module)


def is_plain_tensor(tensor: object) -> TypeGuard[Tensor]:
    """True if the ops accept the tensor: it is strided, not nested, and its class does not override `F.linear`."""
    return type(tensor) in _TENSORS and tensor.layout == torch.strided and not tensor.is_nested  # type: ignore[attr-defined]


def is_plain_input(input: object) -> TypeGuard[Tensor]:
    """True if the ops accept the tensor as an input: on a CPU, CUDA or meta device, without forward-mode AD."""
    return is_plain_tensor(input) and (input.is_cpu or input.is_cuda or input.is_meta) and forward_ad._current_level < 0


def has_plain_parameters(layer: nn.Module) -> bool:
    """True if the ops accept a linear layer's weight and bias."""
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias", _ABSENT)
    return is_plain_tensor(weight) and weight.is_floating_point() and (bias is None or is_plain_tensor(bias))


def activation_of(layer: nn.Module) -> ops.Activation | None:
    """Return the activation that is built into a plain linear layer, or None."""
    return layer.activation if isinstance(layer, _Linear) else None


_NAMES: dict[type[nn.Module], ops.Activation] = {nn.ReLU: "relu", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh"}
_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, Linear, BernoulliHead, GaussianHead, *_NAMES)
_FORWARDS = {kind: kind.forward for kind in _KINDS}
_TENSORS = {Tensor, nn.Parameter, FakeTensor, FunctionalTensor}  # the last two replace tensors during tracing
_ABSENT = object()
