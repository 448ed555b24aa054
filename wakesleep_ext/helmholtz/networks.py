"""Networks that the conditionals of a Helmholtz machine are made of; any other module may take their place."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from wakesleep_ext.modules import Sequential, activation_of, is_linear, runs_forward_only, through

Activation = Literal["tanh", "relu", "gelu", "silu", "elu", "softplus", "sigmoid"]

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
    """Linear layers of the given sizes with an activation between them, `[*, first] -> [*, last]`.

    Weights start as Glorot & Bengio (2010) propose, biases at zero, the last one at `output_bias`
    if it is given. The input may have any dtype,
    binary pixels as bool or uint8 included: it is cast to that of the weights.
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
        """The last layer."""
        last = next(reversed(self._modules.values()))  # self[-1] takes four times as long
        assert isinstance(last, nn.Linear)
        return last

    @property
    def may_be_fused(self) -> bool:
        """Whether an op may compute the head's product: the head is plain, and nothing waits for what it returns."""
        is_own = type(self).forward is MultilayerPerceptron.forward and runs_forward_only(self)
        return is_own and is_linear(self.head) and activation_of(self.head) is None

    def features(self, input: Tensor) -> Tensor:
        """What the last layer gets, `[*, first] -> [*, next to last]`."""
        *hidden, _ = self
        return through(hidden, input.to(self.head.weight.dtype))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.head.weight.dtype))


class Constant(nn.Module):
    """A learnt vector `[size]`, zero at first, whatever the input: the network of a prior."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(size))

    def forward(self, input: Tensor | None = None) -> Tensor:
        return self.value
