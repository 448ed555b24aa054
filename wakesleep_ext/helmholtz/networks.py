"""Networks for the conditionals of a Helmholtz machine. You can use any other module in their place."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wakesleep_ext.modules import Sequential, activation_of, is_linear, runs_forward_only, through

if TYPE_CHECKING:
    from wakesleep_ext.helmholtz.config import Activation

_ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
}


class MultilayerPerceptron(Sequential):
    """Linear layers of the given sizes with an activation between consecutive layers, `[*, first] -> [*, last]`.

    Weights are initialised as in Glorot & Bengio (2010), and biases to zero. If `output_bias` is given, it is the
    initial bias of the last layer.
    The input is cast to the dtype of the weights, so it may have any dtype, such as bool or uint8 pixels.
    """

    def __init__(self, sizes: Sequence[int], activation: Activation, output_bias: Tensor | None = None) -> None:
        linears = [nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(sizes)]
        for linear in linears:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        if output_bias is not None:
            with torch.no_grad():
                linears[-1].bias.copy_(output_bias)
        layers = [layer for linear in linears for layer in (linear, _ACTIVATIONS[activation]())]
        super().__init__(*layers[:-1])

    @property
    def head(self) -> nn.Linear:
        """The last linear layer."""
        last = next(reversed(self._modules.values()))  # self[-1] would take four times as long as this
        assert isinstance(last, nn.Linear)
        return last

    @property
    def may_be_fused(self) -> bool:
        """True if a fused op may replace the last layer.

        This requires that no activation follows the last layer, and that `forward` is not overridden and has no hooks.
        """
        is_own = type(self).forward is MultilayerPerceptron.forward and runs_forward_only(self)
        return is_own and is_linear(self.head) and activation_of(self.head) is None

    def features(self, input: Tensor) -> Tensor:
        """Return the activations that enter the last layer, `[*, first] -> [*, next to last]`."""
        *hidden, _ = self
        return through(hidden, input.to(self.head.weight.dtype))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.head.weight.dtype))


class Constant(nn.Module):
    """A trainable vector `[size]`, initially zero. It ignores the input, and can thus parameterise a prior."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(size))

    def forward(self, input: Tensor | None = None) -> Tensor:
        return self.value
