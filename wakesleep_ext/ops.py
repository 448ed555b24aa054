"""The fused ops: diagonal Gaussians and Bernoulli vectors, sampled and scored in one pass over memory.

Common to all of them:

- **Shapes.** Parameters come first, then the value. The last dimension is the event (K latent, D observed) and is
  summed over; every leading dimension broadcasts, and nothing is expanded in memory. Views with any leading strides
  are read in place, such as the two halves of a packed ``[mu | logvar]``: see :func:`gaussian_parameters`.
- **Dtypes.** float64, float32, bfloat16 and float16. Arithmetic is float32, and float64 for float64;
  log-probabilities and divergences are returned in that type, samples in the dtype of the parameters. Arguments of
  unequal dtypes are promoted.
- **Gradients.** First order by fused kernels, any order by the formula (``create_graph=True``). Gradients reach every
  floating argument unless stated otherwise.
- **Randomness.** A draw is a function of its arguments and a ``key``, int64 ``[seed, offset]`` on their device; see
  :mod:`wakesleep_ext.random`. Without one, a key is drawn from ``generator`` or, failing that, torch's default.
- **Errors.** ``ValueError`` for shapes and devices, ``TypeError`` for dtypes, naming the op, the argument, what was
  expected and what came. Values are not inspected, since that would stop a GPU: NaN gives NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from wakesleep_ext import random
from wakesleep_ext._registrations import call

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
    r"""The two halves of a packed :math:`[\mu \,|\, \ell]`, as a network with one last layer emits it.

    As ``packed.chunk(2, -1)``, but for the gradient: the Gaussian ops write those of mu and logvar into one packed
    tensor, and where one op's gradients are all there are, that tensor is handed on as it stands. ``chunk`` would copy
    the halves into a third.

    Args:
        packed: means beside logarithms of variances, ``[*B, 2K]``.

    Returns:
        mu and logvar, ``[*B, K]`` each: views, which must not be written to where ``packed`` requires a gradient.
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
    r"""Reparameterised samples :math:`z = \mu + e^{\ell/2}\,\epsilon`, :math:`\epsilon \sim N(0, I)`.

    Args:
        mu: means :math:`\mu`, ``[*B, K]``.
        logvar: logarithms :math:`\ell` of the variances, ``[*B, K]``.
        sample_shape: S, how many samples of each Gaussian.
        key: what the noise is a function of; int64 ``[2]``.
        generator: where a key is drawn from if none is given.

    Returns:
        z, ``[*S, *B, K]``, in the dtype of the parameters.

    Gradients: :math:`\partial z/\partial\mu = 1`, :math:`\partial z/\partial\ell = (z-\mu)/2`. Only the key is kept
    for them; the noise is drawn again.

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
    r"""Samples as :func:`gaussian_rsample`, with their log-density, in one pass.

    :math:`\log q(z) = -\tfrac12 \sum_k [\ell_k + \epsilon_k^2 + \log 2\pi]`, from the noise itself rather than from
    the rounded z.

    Args:
        mu: means, ``[*B, K]``.
        logvar: logarithms of the variances, ``[*B, K]``.
        sample_shape: S, how many samples of each Gaussian.
        key: what the noise is a function of; int64 ``[2]``.
        generator: where a key is drawn from if none is given.

    Returns:
        z, ``[*S, *B, K]``, in the dtype of the parameters, and log q(z), ``[*S, *B]``, in float32 or float64.

    Gradients: of z as for :func:`gaussian_rsample`. Those of log q are the total ones, through the sample:
    :math:`\partial/\partial\mu = 0`, :math:`\partial/\partial\ell = -\tfrac12`. For the partial ones, z held fixed,
    pass ``z.detach()`` to :func:`gaussian_log_prob`.
    """
    key = random.draw_key(mu, generator) if key is None else key
    return call(_ops.gaussian_rsample_log_prob.default, mu, logvar, key, sample_shape)


def gaussian_log_prob(mu: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
    r"""Log-density of a diagonal Gaussian,
    :math:`-\tfrac12 \sum_k [\ell_k + (z_k-\mu_k)^2 e^{-\ell_k} + \log 2\pi]`.

    Args:
        mu: means :math:`\mu`, ``[*B, K]``.
        logvar: logarithms :math:`\ell` of the variances, ``[*B, K]``.
        z: where to evaluate, ``[*S, *B, K]``.

    Returns:
        ``[*S, *B]``, float32 or float64.

    Gradients, with :math:`d = (z-\mu)e^{-\ell}`: d for mu, :math:`\tfrac12[(z-\mu)d - 1]` for logvar, -d for z.
    """
    return call(_ops.gaussian_log_prob.default, mu, logvar, z)


def standard_gaussian_log_prob(z: Tensor) -> Tensor:
    r"""Log-density of N(0, I), :math:`-\tfrac12 \sum_k [z_k^2 + \log 2\pi]`.

    Args:
        z: where to evaluate, ``[*B, K]``.

    Returns:
        ``[*B]``, float32 or float64.

    Gradient: -z.
    """
    return call(_ops.standard_gaussian_log_prob.default, z)


def gaussian_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    r"""Divergence from the standard Gaussian,
    :math:`KL(N(\mu, e^\ell)\,\|\,N(0, I)) = \tfrac12 \sum_k [\mu_k^2 + e^{\ell_k} - 1 - \ell_k]`, in nats.

    Args:
        mu: means :math:`\mu`, ``[*B, K]``.
        logvar: logarithms :math:`\ell` of the variances, ``[*B, K]``.

    Returns:
        ``[*B]``, float32 or float64.

    Gradients: mu for mu, :math:`\tfrac12(e^\ell - 1)` for logvar.

    Source: Kingma & Welling, "Auto-encoding variational Bayes" (2014), appendix B.
    """
    return call(_ops.gaussian_kl.default, mu, logvar)


def bernoulli_log_prob(logits: Tensor, x: Tensor) -> Tensor:
    r"""Log-likelihood of independent Bernoulli variables,
    :math:`\sum_d [x_d a_d - \mathrm{softplus}(a_d)]`.

    Args:
        logits: log-odds :math:`a = \log p/(1-p)`, ``[*S, *B, D]``. Infinite ones give NaN.
        x: the observation, ``[*B, D]``; bool, uint8 holding 0 and 1, or floating. Values between 0 and 1 give the
            cross-entropy.

    Returns:
        ``[*S, *B]``, float32 or float64, whatever the dtype of the logits.

    Gradients: :math:`x - \mathrm{sigmoid}(a)` for the logits, :math:`a` for a floating x.

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
    r"""Independent Bernoulli draws: 1 where a uniform is at most :math:`\mathrm{sigmoid}(a)`.

    Args:
        logits: log-odds :math:`a`, ``[*B, D]``.
        sample_shape: S, how many draws of each.
        dtype: of the result: bool, uint8 or floating; that of the logits by default.
        key: what the draw is a function of; int64 ``[2]``.
        generator: where a key is drawn from if none is given.

    Returns:
        Zeros and ones, ``[*S, *B, D]``. NaN logits give 0.

    Gradients: none; the result does not require one.
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
    """Binary images, each pixel on with the probability that its grey level stands for: x ~ Bernoulli(grey / white),
    the dynamic binarisation of Salakhutdinov & Murray (2008). A batch is found and drawn in one pass.

    Args:
        grey: the images, uint8 ``[N, D]``, levels of 0 to ``white``.
        white: the level of a pixel that is surely on, 1 to 255. One at 0 is surely off.
        index: which images, int64 ``[B]``; all of them, in their order, if not given.
        dtype: of the result: bool, uint8 or floating; uint8 by default.
        key: what the draw is a function of; int64 ``[2]``.
        generator: where a key is drawn from if none is given.

    Returns:
        Zeros and ones, ``[B, D]``.

    Raises:
        IndexError: an index is not that of an image; on a GPU, as with torch's own indexing, a device-side assertion.
    """
    key = random.draw_key(grey, generator) if key is None else key
    return call(_ops.binarize.default, grey, key, white, index, dtype)


def linear(h: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None = None) -> Tensor:
    r"""Layer :math:`y = f(hW^\top + b)` of a network, as ``torch.tanh(F.linear(h, weight, bias))`` in fewer passes: the
    bias is added and f taken where the matrix product has left its result, and the backward pass forms the gradient of
    the bias on its way. Small batches are multiplied by kernels of our own. Large ones are, on a CPU, by oneDNN where
    that is worthwhile: float32, next to a BLAS that does without the processor's AVX-512.

    Args:
        h: ``[*B, H]``.
        weight: W, ``[D, H]``, as ``nn.Linear`` has it.
        bias: b, ``[D]``, or None.
        activation: f, ``"relu"``, ``"sigmoid"`` or ``"tanh"``; None for none.

    Returns:
        ``[*B, D]``, in the dtype of the parameters; computed in float32 for half types.

    Gradients: with :math:`\delta = g f'`, where f' is a function of y, :math:`\delta W` for h, :math:`\delta^\top h`
    for weight, the sum of :math:`\delta` for bias, accumulated in float32, or float64. y is kept for the backward pass
    if there is an activation.

    Raises:
        ValueError: ``activation`` is none of these.
    """
    return call(_ops.mlp.default, h, (weight,), (_bias(weight, bias),), None, activation)


def mlp(
    h: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: Activation | None = None,
    output_activation: Activation | None = None,
) -> Tensor:
    r"""Layers one after the other, each :func:`linear`: :math:`h_l = f(h_{l-1} W_l^\top + b_l)`, in one call.

    A chunk of rows goes through all layers, forwards or backwards, while it is in cache; and where networks are small,
    one call costs less than one for each layer, and so does one node in the graph of autograd.

    Args:
        h: :math:`h_0`, ``[*B, H]``.
        weights: :math:`W_1, \dots, W_T`, ``[D, H]`` each, as ``nn.Linear`` has it; H is the D of the one before.
        biases: :math:`b_1, \dots, b_T`, ``[D]`` each, or None.
        activation: f of every layer but the last, ``"relu"``, ``"sigmoid"`` or ``"tanh"``; None for none.
        output_activation: that of the last layer.

    Returns:
        :math:`h_T`, ``[*B, D]``, in the dtype of the parameters; computed in float32 for half types.

    Gradients: those of :func:`linear`, of all layers in one pass. :math:`h_1, \dots, h_{T-1}` are kept for it, and
    :math:`h_T` if it has an activation.

    Raises:
        ValueError: there are no layers, they do not fit each other, or an activation is none of these.
    """
    biases = [_bias(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return call(_ops.mlp.default, h, weights, biases, activation, output_activation)


def linear_bernoulli_log_prob(
    h: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, *, recompute: bool | None = None
) -> Tensor:
    r"""Log-likelihood under a Bernoulli head, :func:`bernoulli_log_prob` of the logits :math:`a = hW^\top + b`, which
    are never held whole.

    Rows are taken in chunks whose logits stay in cache: each is multiplied by the platform's BLAS, and scored while it
    is there. Half types are multiplied with float32 results, which are not rounded before they are scored.

    Args:
        h: the last hidden layer, ``[*S, *B, H]``. It is copied if x has leading dimensions that it has not.
        weight: W, ``[D, H]``, as ``nn.Linear`` has it.
        bias: b, ``[D]``, or None.
        x: the observation, ``[*B, D]``; bool, uint8 holding 0 and 1, or floating.
        recompute: what is kept for the gradients, besides the arguments. True: nothing; the logits are recomputed,
            chunk by chunk, which is one matrix product more (four instead of three), and memory does not grow with
            the logits. False: the logits, in float32 or float64. None: the logits if they take no more than 4 MiB,
            on a GPU 16 MiB.

    Returns:
        ``[*S, *B]``, float32 or float64, whatever the dtype of the parameters.

    Gradients, exact for any upstream gradient g of each row: with :math:`\delta = g\,(x - \mathrm{sigmoid}(a))`,
    :math:`\delta W` for h, :math:`\delta^\top h` for weight, the sum of :math:`\delta` for bias, :math:`g a` for a
    floating x. They are accumulated in float32, or float64. If the g are known beforehand, as weights of a sum,
    :func:`linear_bernoulli_log_prob_sum` does without keeping and without recomputing.
    """
    bias = _bias(weight, bias)
    return call(_ops.linear_bernoulli_log_prob.default, h, weight, bias, x, recompute)


def linear_bernoulli_log_prob_sum(
    h: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, sample_weight: Tensor | None = None
) -> Tensor:
    r"""Weighted sum of log-likelihoods under a Bernoulli head, :math:`\sum_n w_n \log p(x_n \mid h_n)`, for training.

    As ``(sample_weight * linear_bernoulli_log_prob(h, weight, bias, x)).sum()``, in chunks whose logits stay in cache.
    The weights being known, the gradients are formed in the forward pass, from the same logits: nothing of their size
    is kept, and nothing is recomputed.

    Args:
        h: the last hidden layer, ``[*S, *B, H]``.
        weight: W, ``[D, H]``.
        bias: b, ``[D]``, or None.
        x: the observation, ``[*B, D]``; bool, uint8 holding 0 and 1, or floating.
        sample_weight: the weights :math:`w_n` of the rows, such as normalised importance weights; broadcasts to
            ``[*S, *B]``. Ones if not given.

    Returns:
        The sum, 0-dimensional, float32 or float64.

    Gradients: as those of :func:`linear_bernoulli_log_prob` with w for g, and :math:`\log p(x_n \mid h_n)` for
    sample_weight, times the upstream gradient. Gradients of gradients (``create_graph=True``) recompute the logits.
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
    r"""Draws from a Bernoulli head, :func:`bernoulli_sample` of the logits :math:`hW^\top + b`, which are never held
    whole. The same key gives the same draw, but where the logits are rounded otherwise.

    Args:
        h: the last hidden layer, ``[*B, H]``.
        weight: W, ``[D, H]``.
        bias: b, ``[D]``, or None.
        dtype: of the result: bool, uint8 or floating; that of the parameters by default.
        key: what the draw is a function of; int64 ``[2]``.
        generator: where a key is drawn from if none is given.

    Returns:
        Zeros and ones, ``[*B, D]``.

    Gradients: none; the result does not require one.
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
    r"""One step of Adam, in place, for all tensors in one pass: with g the gradient of a parameter p,

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1)\, g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2, \qquad
        p \leftarrow p - \frac{\mathrm{lr}}{1 - \beta_1^t}\,
        \frac{m}{\sqrt{v} / \sqrt{1 - \beta_2^t} + \epsilon}.

    As ``torch.optim.Adam`` up to rounding, with one division an element. The host reads nothing that is on a GPU, so a
    CUDA graph can hold it.

    Args:
        parameters: p, of any shapes, all of one dtype and dense: without gaps, their dimensions in any order in memory.
        gradients: g, of the same shapes and dtype. They are copied if they lie otherwise than the parameters.
        exp_avgs: m, as the parameters, with the same strides; zeros before the first step.
        exp_avg_sqs: v, likewise.
        step: t, the number of this step, counted from 1: 0-dimensional, float32 or float64.
        lr: 0-dimensional, float32 or float64.
        beta1: :math:`\beta_1`, what remains of m.
        beta2: :math:`\beta_2`, what remains of v.
        eps: :math:`\epsilon`.

    Returns:
        None. p, m and v are changed in place.

    Gradients: none, it is to be called under ``torch.no_grad()``.

    Raises:
        ValueError: the lists are not equally long, or tensors differ in shape or device, or are laid out otherwise.
        TypeError: tensors differ in dtype. Whatever is raised, nothing has been changed.
        RuntimeError: a parameter requires a gradient, and gradients are being recorded.

    Source: Kingma & Ba, "Adam: a method for stochastic optimization" (ICLR 2015), algorithm 1.
    """
    call(_ops.adam_.default, parameters, gradients, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, eps)


def _bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight.new_zeros(weight.shape[:1]) if bias is None else bias
