"""The Helmholtz machine: a recognition network q(z|x) and a generative network p(x, z), both chains of conditionals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from wakesleep_ext.densities import Distribution
from wakesleep_ext.helmholtz.conditionals import (
    BernoulliConditional,
    Conditional,
    GaussianConditional,
    LinearBernoulliConditional,
    StandardGaussianPrior,
)
from wakesleep_ext.helmholtz.config import ModelConfig
from wakesleep_ext.helmholtz.networks import Constant, MultilayerPerceptron

Keys: TypeAlias = "Sequence[Tensor | None] | None"

PIXEL_MEAN_CLIP = 1e-3
"""Pixel means are clipped to [0.001, 0.999] before the logit is taken."""


class Factor(NamedTuple):
    """A factor p(value | given) of a joint distribution, evaluated at a value."""

    conditional: Conditional
    value: Tensor
    """`[*S, *B, K]`."""
    given: Tensor | None
    """`[*S, *B, J]`; None for a prior."""

    @property
    def distribution(self) -> Distribution:
        """The distribution p(. | given)."""
        distribution: Distribution = self.conditional(self.given)
        return distribution

    def log_prob(self) -> Tensor:
        """Return log p(value | given), `[*S, *B]`, float32 or float64."""
        return self.distribution.log_prob(self.value)


class _Chain(nn.ModuleList):
    """A sequence of conditionals whose product is a joint distribution."""

    def __iter__(self) -> Iterator[Conditional]:
        return super().__iter__()  # type: ignore[return-value]

    def factors(self, latents: Sequence[Tensor], x: Tensor) -> list[Factor]:
        """Return the factors in the order of the conditionals.

        Args:
            latents: z_1, ..., z_T, starting with the layer next to x, `[*S, *B, K]` each.
            x: binary pixels `[*B, D]`: bool, uint8 or floating.
        """
        raise NotImplementedError

    def log_prob(self, latents: Sequence[Tensor], x: Tensor) -> Tensor:
        """Return the sum of log p(value | given) over the :meth:`factors`, `[*S, *B]`, float32 or float64."""
        return reduce(torch.add, [factor.log_prob() for factor in self.factors(latents, x)])


class Draw(NamedTuple):
    """A draw of one stochastic layer from the recognition network."""

    q: Distribution
    """The distribution of the draw."""
    z: Tensor
    """`[L, *B, K]`."""
    log_q: Tensor
    """`[L, *B]`."""


class RecognitionNetwork(_Chain):
    """The recognition network q(z|x) = q(z_1|x) q(z_2|z_1) ... q(z_T|z_{T-1}).

    Args:
        conditionals: the factors, in the order of this formula.
    """

    @property
    def has_rsample(self) -> bool:
        """True if the draws of all layers are differentiable."""
        return all(conditional.has_rsample for conditional in self)

    def factors(self, latents: Sequence[Tensor], x: Tensor) -> list[Factor]:
        return [Factor(*parts) for parts in zip(self, latents, (x, *latents[:-1]), strict=True)]

    def rsample(self, x: Tensor, num_samples: int = 1, *, keys: Keys = None) -> tuple[Tensor, ...]:
        """Draw z ~ q(z|x).

        Args:
            x: binary pixels `[*B, D]`.
            num_samples: L.
            keys: one key for each stochastic layer (see `wakesleep_ext.random.draw_key`). The default draws new keys.

        Returns:
            z_1, ..., z_T, `[L, *B, K]` each. They are differentiable if the conditionals support it (`has_rsample`).
        """
        given, latents = x, []
        sample_shape: tuple[int, ...] = (num_samples,)
        for conditional, key in zip(self, _keys(keys, self), strict=True):
            given = conditional.rsample(given, sample_shape, key=key)
            latents.append(given)
            sample_shape = ()
        return tuple(latents)

    def rsample_log_prob(
        self, x: Tensor, num_samples: int = 1, *, keys: Keys = None, detach: bool = False
    ) -> list[Draw]:
        """Draw as :meth:`rsample` does, and return the log-probability of each layer's draw.

        Args:
            x, num_samples, keys: as in :meth:`rsample`.
            detach: treat the draws as constants, so that z has no gradient and log q is differentiated at fixed z.
                Otherwise the gradient of log q is the total derivative, which includes the path through z.
        """
        given, draws = x, []
        sample_shape: tuple[int, ...] = (num_samples,)
        for conditional, key in zip(self, _keys(keys, self), strict=True):
            q = conditional(given)
            if detach:
                with torch.no_grad():
                    given = q.rsample(sample_shape, key=key)
                log_q = q.log_prob(given)
            else:
                given, log_q = q.rsample_log_prob(sample_shape, key=key)
            draws.append(Draw(q, given, log_q))
            sample_shape = ()
        return draws


class Dream(NamedTuple):
    """A draw from the generative network: z ~ p(z), then x ~ p(x|z)."""

    latents: tuple[Tensor, ...]
    """z_1, ..., z_T, `[N, K]` each."""
    x: Tensor
    """Binary pixels `[N, D]`, 0 or 1 in the dtype of the logits."""


class GenerativeNetwork(_Chain):
    """The generative network p(x, z) = p(x|z_1) p(z_1|z_2) ... p(z_T).

    Args:
        conditionals: the factors, in the order of this formula. The last factor is the prior of z_T, and is called with
            None.
    """

    def factors(self, latents: Sequence[Tensor], x: Tensor) -> list[Factor]:
        return [Factor(*parts) for parts in zip(self, (x, *latents), (*latents, None), strict=True)]

    def sample_latents(self, sample_shape: Sequence[int], *, keys: Keys = None) -> tuple[Tensor, ...]:
        """Draw z ~ p(z), without gradients.

        Args:
            sample_shape: S.
            keys: one key for each stochastic layer from z_T down. The default draws new keys.

        Returns:
            z_1, ..., z_T, `[*S, K]` each.
        """
        given, latents, (_, *of_latents) = None, [], self
        with torch.no_grad():
            for conditional, key in zip(reversed(of_latents), _keys(keys, of_latents), strict=True):
                given = conditional.rsample(given, sample_shape, key=key)
                latents.append(given)
                sample_shape = ()
        return tuple(reversed(latents))

    def dream(self, num_dreams: int, *, keys: Keys = None) -> Dream:
        """Draw latent variables and images by ancestral sampling, without gradients.

        Args:
            num_dreams: N.
            keys: one key for each stochastic layer from z_T down, then one for x. The default draws new keys.
        """
        *of_latents, of_x = _keys(keys, self)
        latents = self.sample_latents((num_dreams,), keys=of_latents)
        with torch.no_grad():
            return Dream(latents, self[0](latents[0]).rsample(key=of_x))

    @torch.no_grad()
    def pixel_means(self, z: Tensor) -> Tensor:
        """Return E[x | z_1] in [0, 1]: `[*, K] -> [*, D]`."""
        means: Tensor = self[0](z).mean
        return means


def _keys(keys: Keys, conditionals: Iterable[nn.Module]) -> Sequence[Tensor | None]:
    return [None for _ in conditionals] if keys is None else keys


class Code(NamedTuple):
    """The latent variables that the recognition network infers for images, in one stochastic layer."""

    mu: Tensor
    """Means, `[N, K]`."""
    logvar: Tensor
    """Log-variances, `[N, K]`."""


class HelmholtzMachine(nn.Module):
    """A recognition and a generative network with the same latent variables (Dayan, Hinton, Neal & Zemel 1995).

    Args:
        recognition: q(z|x).
        generative: p(x, z).
    """

    def __init__(self, recognition: RecognitionNetwork, generative: GenerativeNetwork) -> None:
        super().__init__()
        self.recognition = recognition
        self.generative = generative

    @classmethod
    def from_config(cls, config: ModelConfig, pixel_mean: Tensor | None = None) -> HelmholtzMachine:
        """Build the machine that a config describes. Initial weights are drawn from torch's default generator.

        Args:
            config: layer sizes, kind of latent variables and activation.
            pixel_mean: `[D]`, the mean of each pixel over the training set, in [0, 1]. The output bias of p(x|z_1)
                starts at the logit of this mean, clipped to [0.001, 0.999]. By default, the bias starts at zero.

        Raises:
            ValueError: `pixel_mean` does not have shape `[D]`.
        """
        if pixel_mean is not None and pixel_mean.shape != (config.observed,):
            raise ValueError(
                f"HelmholtzMachine.from_config: expected pixel_mean to have shape [{config.observed}], "
                f"got {list(pixel_mean.shape)}"
            )
        return cls(RecognitionNetwork(_recognition(config)), GenerativeNetwork(_generative(config, pixel_mean)))

    @classmethod
    def from_networks(
        cls, encoder: nn.Module, decoder: nn.Module, latent: int, *, logvar_bounds: tuple[float, float] | None = None
    ) -> HelmholtzMachine:
        """Build a machine of one Gaussian layer with prior N(0, I) from two networks of any kind.

        The networks work on rows; see :class:`wakesleep_ext.helmholtz.conditionals.NetworkConditional`.

        Args:
            encoder: maps pixels `[N, D]` to `[mu | logvar]`, `[N, 2K]`.
            decoder: maps z `[N, K]` to logits of the pixels, `[N, D]` or a shape with as many elements per row, such as
                `[N, 1, H, W]`.
            latent: K.
            logvar_bounds: the lowest and the highest log-variance, to which those of the encoder are clamped.

        Raises:
            ValueError: the bounds are not finite numbers in increasing order.
        """
        generative = GenerativeNetwork([BernoulliConditional(decoder), StandardGaussianPrior(latent)])
        return cls(RecognitionNetwork([GaussianConditional(encoder, logvar_bounds)]), generative)

    @torch.no_grad()
    def encode(self, x: Tensor, *, chunk_rows: int = 2000) -> list[Code]:
        """Return mean and log-variance of the latent variables that the recognition network infers.

        The first layer has those of q(z_1|x). Above it, those of q(z_t|z_{t-1}) at the mean of z_{t-1}. This takes no
        random draw, but is not the mean over z_{t-1}.

        Args:
            x: binary pixels `[N, D]`.
            chunk_rows: maximum number of images in a pass.

        Returns:
            One :class:`Code` per stochastic layer, starting with the layer next to x, on the device of x.

        Raises:
            ValueError: `chunk_rows` is below 1.
        """
        if chunk_rows < 1:
            raise ValueError(f"HelmholtzMachine.encode: expected chunk_rows >= 1, got {chunk_rows}")
        chunks = []
        for given in x.split(chunk_rows):
            codes = []
            for conditional in self.recognition:
                q = conditional(given)
                given = q.mean
                codes.append(Code(given, q.log_variance))
            chunks.append(codes)
        return [Code(*map(torch.cat, zip(*layer, strict=True))) for layer in zip(*chunks, strict=True)]

    def dream(self, num_dreams: int, *, keys: Keys = None) -> Dream:
        """Draw from the generative network; see :meth:`GenerativeNetwork.dream`."""
        return self.generative.dream(num_dreams, keys=keys)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, *, keys: Keys = None) -> Tensor:
        """Return E[x | z_1] for one draw z_1 ~ q(z_1|x): pixels in [0, 1], `[N, D] -> [N, D]`."""
        return self.generative.pixel_means(self.recognition.rsample(x, keys=keys)[0][0])


def _recognition(config: ModelConfig) -> Iterator[Conditional]:
    yield _latent(config, config.observed, config.recognition_hidden, config.latent[0])
    for below, above in pairwise(config.latent):
        yield _latent(config, below, config.latent_hidden, above)


def _generative(config: ModelConfig, pixel_mean: Tensor | None) -> Iterator[Conditional]:
    output_bias = None if pixel_mean is None else torch.logit(pixel_mean, eps=PIXEL_MEAN_CLIP)
    sizes = (config.latent[0], *config.generative_hidden, config.observed)
    yield LinearBernoulliConditional(MultilayerPerceptron(sizes, config.activation, output_bias))
    for below, above in pairwise(config.latent):
        yield _latent(config, above, config.latent_hidden, below)
    if config.latents == "gaussian":
        yield StandardGaussianPrior(config.latent[-1])
    else:
        yield BernoulliConditional(Constant(config.latent[-1]))


def _latent(config: ModelConfig, given: int, hidden: Sequence[int], size: int) -> Conditional:
    """Return a conditional of `size` latent variables, given pixels or the latent variables of another layer."""
    if config.latents == "gaussian":
        network = MultilayerPerceptron((given, *hidden, 2 * size), config.activation)
        return GaussianConditional(network, config.logvar_bounds)
    return BernoulliConditional(MultilayerPerceptron((given, *hidden, size), config.activation))
