"""The Helmholtz machine: a recognition network q(z|x) and a generative model p(z) p(x|z)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from wakesleep_ext import ops, random

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

PIXEL_MEAN_CLIP = 1e-3
"""Pixel means are clipped to [0.001, 0.999] before their logit is taken."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and activation of both networks.

    Raises:
        ValueError: a size is not a positive integer, or the activation is unknown.
    """

    observed: int
    """Pixels of an image, D."""
    latent: int = 50
    """Latent variables, K."""
    recognition_hidden: tuple[int, ...] = (200, 200)
    """Hidden widths of the recognition network, from x to z."""
    generative_hidden: tuple[int, ...] = (200, 200)
    """Hidden widths of the generative network, from z to x."""
    activation: Activation = "tanh"
    """Activation after each hidden layer."""

    def __post_init__(self) -> None:
        sizes = {
            "observed": (self.observed,),
            "latent": (self.latent,),
            "recognition_hidden": self.recognition_hidden,
            "generative_hidden": self.generative_hidden,
        }
        for name, values in sizes.items():
            if not all(type(value) is int and value > 0 for value in values):
                raise ValueError(f"ModelConfig: expected {name} > 0, got {getattr(self, name)}")
        if self.activation not in get_args(Activation):
            names = ", ".join(get_args(Activation))
            raise ValueError(f"ModelConfig: expected activation to be one of {names}, got {self.activation!r}")


class MultilayerPerceptron(nn.Sequential):
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

    def features(self, input: Tensor) -> Tensor:
        """What the last layer gets, `[*, first] -> [*, next to last]`."""
        output = input.to(self.head.weight.dtype)
        hidden = list(self._modules.values())[:-1]
        for linear, activation in zip(hidden[::2], hidden[1::2], strict=True):
            hooked = _has_hooks(linear) or _has_hooks(activation)
            if isinstance(linear, nn.Linear) and isinstance(activation, nn.Tanh) and not hooked:
                output = ops.linear_tanh(output, linear.weight, linear.bias)
            else:
                output = activation(linear(output))
        return output

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.head(self.features(input))
        return output


def log_likelihood(generative: nn.Module, z: Tensor, x: Tensor) -> Tensor:
    """log p(x|z) of each row; its backward pass, of a perceptron, recomputes the logits if they are many.

    Args:
        generative: maps z `[*, K]` to logits `[*, D]`.
        z: latent variables `[*S, *B, K]`.
        x: binary pixels `[*B, D]`: bool, uint8 or floating.

    Returns:
        `[*S, *B]`.
    """
    return _decode(generative, z, ops.linear_bernoulli_log_prob, ops.bernoulli_log_prob, x)


def log_likelihood_sum(generative: nn.Module, z: Tensor, x: Tensor, importance: Tensor) -> Tensor:
    """The sum of `importance` times :func:`log_likelihood` over all rows, 0-dimensional; for training, since the
    gradients of a perceptron come with it.

    Args:
        generative, z, x: as there.
        importance: weights that broadcast to `[*S, *B]`.
    """
    return _decode(
        generative,
        z,
        ops.linear_bernoulli_log_prob_sum,
        lambda logits, x, importance: (importance * ops.bernoulli_log_prob(logits, x)).sum(),
        x,
        importance,
    )


def sample_pixels(generative: nn.Module, z: Tensor, *, key: Tensor | None = None) -> Tensor:
    """x ~ p(x|z): `[*, K] -> [*, D]`, 0 or 1 in the dtype of the logits."""
    key = random.draw_key(z) if key is None else key
    return _decode(generative, z, partial(ops.linear_bernoulli_sample, key=key), partial(ops.bernoulli_sample, key=key))


def _decode(
    generative: nn.Module, z: Tensor, of_head: Callable[..., Tensor], of_logits: Callable[..., Tensor], *others: Tensor
) -> Tensor:
    """The logits of a network whose last layer is known to be linear need not be held, unless a hook waits for them."""
    if isinstance(generative, MultilayerPerceptron) and not (_has_hooks(generative) or _has_hooks(generative.head)):
        return of_head(generative.features(z), generative.head.weight, generative.head.bias, *others)
    return of_logits(generative(z), *others)


def _has_hooks(module: nn.Module) -> bool:
    kinds = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return any(kinds)


class Dream(NamedTuple):
    """A draw from the generative model: z ~ p(z), then x ~ p(x|z)."""

    z: Tensor
    """Latent variables `[N, K]`; `sigmoid(generative(z))` is the mean of each pixel."""
    x: Tensor
    """Binary pixels `[N, D]`, 0 or 1 in the dtype of the logits."""


@torch.no_grad()
def dream(
    generative: nn.Module,
    num_dreams: int,
    latent: int,
    *,
    keys: tuple[Tensor, Tensor] | None = None,
) -> Dream:
    """Dream: z ~ N(0, I), x ~ Bernoulli(sigmoid(generative(z))), without gradients.

    Args:
        generative: maps z `[N, K]` to logits `[N, D]`; its parameters give device and dtype.
        num_dreams: N.
        latent: K.
        keys: one key for z and one for x (`wakesleep_ext.random.draw_key`), drawn if not given.
    """
    key_z, key_x = keys if keys is not None else (None, None)
    zeros = next(generative.parameters()).new_zeros(latent)
    z = ops.gaussian_rsample(zeros, zeros, (num_dreams,), key=key_z)
    return Dream(z, sample_pixels(generative, z, key=key_x))


class HelmholtzMachine(nn.Module):
    """A recognition and a generative network facing each other (Dayan, Hinton, Neal & Zemel 1995).

    `recognition` maps x `[*, D]` to `[mu | logvar]` packed in one tensor `[*, 2K]`, so that
    `mu, logvar = ops.gaussian_parameters(recognition(x))` are views: q(z|x) = N(mu, exp(logvar)).
    `generative` maps z `[*, K]` to logits `[*, D]`: p(z) = N(0, I), p(x|z) = Bernoulli(sigmoid(·)).

    Args:
        config: sizes and activation.
        pixel_mean: `[D]`, the training set's mean of each pixel in [0, 1]. The output bias of the
            generative network starts at its logit, the mean clipped to [0.001, 0.999]; without
            it, at zero.
    """

    def __init__(self, config: ModelConfig, pixel_mean: Tensor | None = None) -> None:
        super().__init__()
        if pixel_mean is not None and pixel_mean.shape != (config.observed,):
            raise ValueError(
                f"HelmholtzMachine: expected pixel_mean to have shape [{config.observed}], got {list(pixel_mean.shape)}"
            )
        self.config = config
        self.recognition = MultilayerPerceptron(
            (config.observed, *config.recognition_hidden, 2 * config.latent), config.activation
        )
        self.generative = MultilayerPerceptron(
            (config.latent, *config.generative_hidden, config.observed),
            config.activation,
            output_bias=None if pixel_mean is None else torch.logit(pixel_mean, eps=PIXEL_MEAN_CLIP),
        )

    def dream(self, num_dreams: int, *, keys: tuple[Tensor, Tensor] | None = None) -> Dream:
        """Draw from the generative model; see :func:`dream`."""
        return dream(self.generative, num_dreams, self.config.latent, keys=keys)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, *, key: Tensor | None = None) -> Tensor:
        """Mean of p(x'|z) at a z ~ q(z|x): pixels in [0, 1], `[*, D] -> [*, D]`."""
        mu, logvar = ops.gaussian_parameters(self.recognition(x))
        return torch.sigmoid(self.generative(ops.gaussian_rsample(mu, logvar, key=key)))
