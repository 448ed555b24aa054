"""Fused ops for diagonal Gaussians, Bernoulli vectors, linear layers and Adam.

The densities and draws each take one pass over memory. All ops follow the same conventions:

- **Shapes.** Parameters come first, then the value. The last dimension is the event (K latent, D observed) and is
  summed over. All leading dimensions broadcast without being expanded in memory. Views with any leading strides are
  read in place, such as the two halves of a packed ``[mu | logvar]``: see :func:`gaussian_parameters`.
- **Dtypes.** float64, float32, bfloat16 and float16. The ops compute in float64 for float64 and in float32 otherwise.
  Log-probabilities and divergences are returned in that type, samples in the dtype of the parameters. Arguments of
  different dtypes are promoted.
- **Gradients.** Fused kernels compute first-order gradients. The formula gives any order (``create_graph=True``).
  Gradients reach every floating-point argument unless stated otherwise.
- **Randomness.** A draw depends only on its arguments and a ``key``, int64 ``[seed, offset]`` on their device; see
  :mod:`wakesleep_ext.random`. Without a key, the op draws one from ``generator`` or from torch's default generator.
- **Errors.** ``ValueError`` for shapes and devices, ``TypeError`` for dtypes. The message names the op, the argument,
  and the expected and actual value. Values are not checked, since that would synchronise a GPU: NaN gives NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from wakesleep_ext import random
from wakesleep_ext._registrations.functorch import call

__all__ = [
    "adam_",
    "bernoulli_log_prob",
    "bernoulli_sample",
    "binarize",
    "gaussian_kl",
    "gaussian_log_prob",
    "gaussian_parameters",
    "gaussian_rsample",
    "gaussian_rsample_log_prob",
    "linear",
    "linear_bernoulli_log_prob",
    "linear_bernoulli_log_prob_sum",
    "linear_bernoulli_sample",
    "mlp",
    "standard_gaussian_log_prob",
]

Activation = Literal["relu", "sigmoid", "tanh"]

_ops = torch.ops.wakesleep_ext


def gaussian_parameters(packed: Tensor) -> tuple[Tensor, Tensor]:
    r"""Split a packed :math:`[\mu \,|\, \ell]`, the output of a network with a single last layer, into its two halves.

    Equivalent to ``packed.chunk(2, -1)``, with a cheaper backward pass. The Gaussian ops write the gradients of mu and
    logvar into one packed tensor. If only one op contributes, that tensor is passed on as it is, whereas ``chunk``
    would copy both halves into a new one.

    Args:
        packed: means, then log-variances, ``[*B, 2K]``.

    Returns:
        mu and logvar, ``[*B, K]`` each, as views. Do not write to them if ``packed`` requires a gradient.
    """
    mu, logvar = call(_ops.gaussian_parameters.default, packed)
    return mu, logvar


def gaussian_rsample(
    mu: Tensor,
    logvar: Tensor,
    sample_shape: Sequence[int] = (),
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw reparameterised samples :math:`z = \mu + e^{\ell/2}\,\epsilon`, :math:`\epsilon \sim N(0, I)`.

    Args:
        mu: means :math:`\mu`, ``[*B, K]``.
        logvar: log-variances :math:`\ell`, ``[*B, K]``.
        sample_shape: S, the samples per Gaussian.
        key: determines the noise; int64 ``[2]``.
        generator: source of the key if none is given.

    Returns:
        z, ``[*S, *B, K]``, in the dtype of the parameters.

    Gradients: :math:`\partial z/\partial\mu = 1`, :math:`\partial z/\partial\ell = (z-\mu)/2`. The backward pass draws
    the noise again from the key instead of storing it.

    Source: Kingma & Welling, "Auto-encoding variational Bayes" (2014), section 2.4.
    """
    key = random.draw_key(mu, generator) if key is None else key
    return call(_ops.gaussian_rsample.default, mu, logvar, key, sample_shape)


def gaussian_rsample_log_prob(
    mu: Tensor,
    logvar: Tensor,
    sample_shape: Sequence[int] = (),
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Draw samples as :func:`gaussian_rsample` does, and return their log-density, in one pass.

    :math:`\log q(z) = -\tfrac12 \sum_k [\ell_k + \epsilon_k^2 + \log 2\pi]` is computed from the noise, not from the
    rounded z.

    Args:
        mu: means, ``[*B, K]``.
        logvar: log-variances, ``[*B, K]``.
        sample_shape: S, the samples per Gaussian.
        key: determines the noise; int64 ``[2]``.
        generator: source of the key if none is given.

    Returns:
        z, ``[*S, *B, K]``, in the dtype of the parameters, and log q(z), ``[*S, *B]``, in float32 or float64.

    Gradients: those of z are as for :func:`gaussian_rsample`. Those of log q are total derivatives, through the sample:
    :math:`\partial/\partial\mu = 0`, :math:`\partial/\partial\ell = -\tfrac12`. For the partial derivatives at fixed z,
    pass ``z.detach()`` to :func:`gaussian_log_prob`.
    """
    key = random.draw_key(mu, generator) if key is None else key
    return call(_ops.gaussian_rsample_log_prob.default, mu, logvar, key, sample_shape)


def gaussian_log_prob(mu: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
    r"""Return the log-density of a diagonal Gaussian,
    :math:`-\tfrac12 \sum_k [\ell_k + (z_k-\mu_k)^2 e^{-\ell_k} + \log 2\pi]`.

    Args:
        mu: means :math:`\mu`, ``[*B, K]``.
        logvar: log-variances :math:`\ell`, ``[*B, K]``.
        z: where to evaluate, ``[*S, *B, K]``.

    Returns:
        ``[*S, *B]``, float32 or float64.

    Gradients, with :math:`d = (z-\mu)e^{-\ell}`: d for mu, :math:`\tfrac12[(z-\mu)d - 1]` for logvar, -d for z.
    """
    return call(_ops.gaussian_log_prob.default, mu, logvar, z)


def standard_gaussian_log_prob(z: Tensor) -> Tensor:
    r"""Return the log-density of N(0, I), :math:`-\tfrac12 \sum_k [z_k^2 + \log 2\pi]`.

    Args:
        z: where to evaluate, ``[*B, K]``.

    Returns:
        ``[*B]``, float32 or float64.

    Gradient: -z.
    """
    return call(_ops.standard_gaussian_log_prob.default, z)


def gaussian_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    r"""Return the KL divergence from a diagonal Gaussian to the standard Gaussian, in nats,
    :math:`KL(N(\mu, e^\ell)\,\|\,N(0, I)) = \tfrac12 \sum_k [\mu_k^2 + e^{\ell_k} - 1 - \ell_k]`.

    Args:
        mu: means :math:`\mu`, ``[*B, K]``.
        logvar: log-variances :math:`\ell`, ``[*B, K]``.

    Returns:
        ``[*B]``, float32 or float64.

    Gradients: mu for mu, :math:`\tfrac12(e^\ell - 1)` for logvar.

    Source: Kingma & Welling, "Auto-encoding variational Bayes" (2014), appendix B.
    """
    return call(_ops.gaussian_kl.default, mu, logvar)


def bernoulli_log_prob(logits: Tensor, x: Tensor) -> Tensor:
    r"""Return the log-likelihood of independent Bernoulli variables,
    :math:`\sum_d [x_d a_d - \mathrm{softplus}(a_d)]`.

    Args:
        logits: log-odds :math:`a = \log p/(1-p)`, ``[*S, *B, D]``. Infinite logits give NaN.
        x: the observation, ``[*B, D]``; bool, uint8 holding 0 and 1, or floating point. Values between 0 and 1 give
            the negative cross-entropy.

    Returns:
        ``[*S, *B]``, float32 or float64, whatever the dtype of the logits.

    Gradients: :math:`x - \mathrm{sigmoid}(a)` for the logits, :math:`a` for a floating-point x.

    Source: Kingma & Welling, "Auto-encoding variational Bayes" (2014), appendix C.1.
    """
    return call(_ops.bernoulli_log_prob.default, logits, x)


def bernoulli_sample(
    logits: Tensor,
    sample_shape: Sequence[int] = (),
    *,
    dtype: torch.dtype | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw independent Bernoulli variables: 1 where a uniform is at most :math:`\mathrm{sigmoid}(a)`.

    Args:
        logits: log-odds :math:`a`, ``[*B, D]``.
        sample_shape: S, the draws per vector of logits.
        dtype: dtype of the result: bool, uint8 or floating point; that of the logits by default.
        key: determines the draw; int64 ``[2]``.
        generator: source of the key if none is given.

    Returns:
        Zeros and ones, ``[*S, *B, D]``. NaN logits give 0.

    Gradients: none; the result does not require a gradient.
    """
    key = random.draw_key(logits, generator) if key is None else key
    return call(_ops.bernoulli_sample.default, logits, key, sample_shape, dtype)


def binarize(
    grey: Tensor,
    white: int = 255,
    index: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw binary images x ~ Bernoulli(grey / white), the dynamic binarisation of Salakhutdinov & Murray (2008).

    One pass gathers the batch and draws its pixels.

    Args:
        grey: the images, uint8 ``[N, D]``, with levels from 0 to ``white``.
        white: the level of a pixel that is always on, 1 to 255. A pixel of level 0 is always off.
        index: indices of the images to draw, int64 ``[B]``; all images in order by default.
        dtype: dtype of the result: bool, uint8 or floating point; uint8 by default.
        key: determines the draw; int64 ``[2]``.
        generator: source of the key if none is given.

    Returns:
        Zeros and ones, ``[B, D]``.

    Raises:
        IndexError: an index is out of range. On a GPU this is a device-side assertion, as in torch's own indexing.
    """
    key = random.draw_key(grey, generator) if key is None else key
    return call(_ops.binarize.default, grey, key, white, index, dtype)


def linear(h: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None = None) -> Tensor:
    r"""Apply a linear layer and its activation, :math:`y = f(hW^\top + b)`.

    Equivalent to ``torch.tanh(F.linear(h, weight, bias))`` in fewer passes over memory. Bias and activation are applied
    to the GEMM's result in place, and the backward pass sums the gradient of the bias as it forms :math:`\delta`.
    Small batches use our own kernels. Large ones use torch's BLAS, or on a CPU oneDNN where that is faster: in float32,
    if the BLAS does not use the processor's AVX-512.

    Args:
        h: input, ``[*B, H]``.
        weight: W, ``[D, H]``, as in ``nn.Linear``.
        bias: b, ``[D]``, or None.
        activation: f, ``"relu"``, ``"sigmoid"`` or ``"tanh"``; None for the identity.

    Returns:
        ``[*B, D]``, in the dtype of the parameters; computed in float32 for half types.

    Gradients: with :math:`\delta = g f'`, they are :math:`\delta W` for h, :math:`\delta^\top h` for weight and the sum
    of :math:`\delta` for bias, accumulated in float32 or float64. f' is computed from y, which is kept for the backward
    pass if there is an activation.

    Raises:
        ValueError: ``activation`` is not one of these.
    """
    return call(_ops.mlp.default, h, (weight,), (_bias(weight, bias),), None, activation)


def mlp(
    h: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: Activation | None = None,
    output_activation: Activation | None = None,
) -> Tensor:
    r"""Apply a chain of linear layers, each as in :func:`linear`: :math:`h_l = f(h_{l-1} W_l^\top + b_l)`.

    A chunk of rows passes through all layers, forward or backward, while it is in cache. For small networks, one call
    and one autograd node also cost less than one per layer.

    Args:
        h: :math:`h_0`, ``[*B, H]``.
        weights: :math:`W_1, \dots, W_T`, ``[D, H]`` each, as in ``nn.Linear``; H is the D of the previous layer.
        biases: :math:`b_1, \dots, b_T`, ``[D]`` each, or None.
        activation: f of every layer but the last: ``"relu"``, ``"sigmoid"`` or ``"tanh"``; None for the identity.
        output_activation: f of the last layer.

    Returns:
        :math:`h_T`, ``[*B, D]``, in the dtype of the parameters; computed in float32 for half types.

    Gradients: as for :func:`linear`, for all layers in one pass. :math:`h_1, \dots, h_{T-1}` are kept for it, and
    :math:`h_T` if the last layer has an activation.

    Raises:
        ValueError: there are no layers, their shapes do not match, or an activation is not one of these.
    """
    biases = [_bias(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return call(_ops.mlp.default, h, weights, biases, activation, output_activation)


def linear_bernoulli_log_prob(
    h: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, *, recompute: bool | None = None
) -> Tensor:
    r"""Return the log-likelihood under a Bernoulli head: :func:`bernoulli_log_prob` of :math:`a = hW^\top + b`.

    The op multiplies a chunk of rows with the platform's BLAS, and scores its logits while they are in cache. Unless
    ``recompute`` keeps them, the logits are never in memory as a whole. For half types, the GEMM returns float32
    logits, which are scored unrounded.

    Args:
        h: the last hidden layer, ``[*S, *B, H]``. It is copied if x has leading dimensions that h lacks.
        weight: W, ``[D, H]``, as in ``nn.Linear``.
        bias: b, ``[D]``, or None.
        x: the observation, ``[*B, D]``; bool, uint8 holding 0 and 1, or floating point.
        recompute: what is kept for the backward pass besides the arguments. True: nothing. The logits are recomputed
            chunk by chunk, at the cost of one more GEMM (four instead of three), and memory does not grow with them.
            False: the logits, in float32 or float64. None: the logits if they take at most 4 MiB, or 16 MiB on a GPU.

    Returns:
        ``[*S, *B]``, float32 or float64, whatever the dtype of the parameters.

    Gradients are exact for any upstream gradient g of each row. With :math:`\delta = g\,(x - \mathrm{sigmoid}(a))` they
    are :math:`\delta W` for h, :math:`\delta^\top h` for weight, the sum of :math:`\delta` for bias and :math:`g a` for
    a floating-point x, accumulated in float32 or float64. If g is known in advance, as the weights of a sum, use
    :func:`linear_bernoulli_log_prob_sum`, which neither keeps nor recomputes the logits.
    """
    bias = _bias(weight, bias)
    return call(_ops.linear_bernoulli_log_prob.default, h, weight, bias, x, recompute)


def linear_bernoulli_log_prob_sum(
    h: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, sample_weight: Tensor | None = None
) -> Tensor:
    r"""Return a weighted sum of log-likelihoods under a Bernoulli head, :math:`\sum_n w_n \log p(x_n \mid h_n)`.

    Equivalent to ``(sample_weight * linear_bernoulli_log_prob(h, weight, bias, x)).sum()``, for training. The weights
    are known in advance, so the forward pass forms the gradients too, from the same chunk of logits in cache. The
    logits are neither kept nor recomputed.

    Args:
        h: the last hidden layer, ``[*S, *B, H]``.
        weight: W, ``[D, H]``.
        bias: b, ``[D]``, or None.
        x: the observation, ``[*B, D]``; bool, uint8 holding 0 and 1, or floating point.
        sample_weight: weights :math:`w_n` of the rows, such as normalised importance weights; broadcasts to
            ``[*S, *B]``. Ones by default.

    Returns:
        The sum, 0-dimensional, float32 or float64.

    Gradients: those of :func:`linear_bernoulli_log_prob` with w for g, and :math:`\log p(x_n \mid h_n)` for
    sample_weight, times the upstream gradient. Second-order gradients (``create_graph=True``) recompute the logits.
    """
    bias = _bias(weight, bias)
    return call(_ops.linear_bernoulli_log_prob_sum.default, h, weight, bias, x, sample_weight)


def linear_bernoulli_sample(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    dtype: torch.dtype | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw from a Bernoulli head: :func:`bernoulli_sample` of the logits :math:`hW^\top + b`.

    The logits are never in memory as a whole. The same key gives the same draw, unless the logits are rounded
    differently.

    Args:
        h: the last hidden layer, ``[*B, H]``.
        weight: W, ``[D, H]``.
        bias: b, ``[D]``, or None.
        dtype: dtype of the result: bool, uint8 or floating point; that of the parameters by default.
        key: determines the draw; int64 ``[2]``.
        generator: source of the key if none is given.

    Returns:
        Zeros and ones, ``[*B, D]``.

    Gradients: none; the result does not require a gradient.
    """
    key = random.draw_key(h, generator) if key is None else key
    return call(_ops.linear_bernoulli_sample.default, h, weight, _bias(weight, bias), key, dtype)


def adam_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    lr: Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> None:
    r"""Take one step of Adam in place, for all tensors in one pass. With g the gradient of a parameter p:

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1)\, g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2, \qquad
        p \leftarrow p - \frac{\mathrm{lr}}{1 - \beta_1^t}\,
        \frac{m}{\sqrt{v} / \sqrt{1 - \beta_2^t} + \epsilon}.

    Equals ``torch.optim.Adam`` up to rounding, with one division per element. The host reads nothing from the GPU, so a
    CUDA graph can capture the step.

    Args:
        parameters: p, of any shape, all of one dtype and dense: without gaps, the dimensions in any memory order.
        gradients: g, of the same shapes and dtype. They are copied if their strides differ from the parameters'.
        exp_avgs: m, like the parameters and with the same strides; zeros before the first step.
        exp_avg_sqs: v, likewise.
        step: t, the number of this step, counted from 1: 0-dimensional, float32 or float64.
        lr: learning rate, 0-dimensional, float32 or float64.
        beta1: :math:`\beta_1`, the decay rate of m.
        beta2: :math:`\beta_2`, the decay rate of v.
        eps: :math:`\epsilon`.

    Returns:
        None. p, m and v are changed in place.

    Gradients: none; call it under ``torch.no_grad()``.

    Raises:
        ValueError: the lists differ in length, or tensors differ in shape, device or memory layout.
        TypeError: tensors differ in dtype. No error of any kind leaves a tensor changed.
        RuntimeError: a parameter requires a gradient, and autograd is recording.

    Source: Kingma & Ba, "Adam: a method for stochastic optimization" (ICLR 2015), algorithm 1.
    """
    call(_ops.adam_.default, parameters, gradients, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, eps)


def _bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight.new_zeros(weight.shape[:1]) if bias is None else bias
