"""Fused ops for diagonal Gaussians, Bernoulli vectors, linear layers and Adam.

Each density and each draw takes one pass over memory. All ops follow the same conventions:

- **Shapes.** The distribution's parameters come first, then the value. The last dimension is the event: K latent
  variables or D observed variables. Densities and divergences sum over the event. All leading dimensions broadcast
  without being expanded in memory. Views with any strides in their leading dimensions are read in place. Examples are
  the two halves of a packed ``[mu | logvar]``; see :func:`gaussian_parameters`.
- **Dtypes.** Arguments may be float64, float32, bfloat16 or float16. Different dtypes are promoted to a common one. The
  ops compute float64 arguments in float64 and all others in float32. Log-probabilities and divergences are returned in
  this compute dtype, and samples in the dtype of the parameters.
- **Gradients.** Fused kernels compute first-order gradients. With ``create_graph=True``, autograd differentiates the
  plain torch formula instead, to any order. Every floating-point argument gets a gradient unless stated otherwise.
- **Randomness.** A draw depends only on its arguments and a ``key``, an int64 tensor ``[seed, offset]`` on the same
  device; see :mod:`wakesleep_ext.random`. If no key is passed, the op draws one from ``generator``, or from torch's
  default generator.
- **Errors.** Invalid shapes and devices raise ``ValueError``; invalid dtypes raise ``TypeError``. The message names the
  op, the argument, and the expected and actual value. Values are not checked, because reading them would synchronise a
  GPU. NaN inputs give NaN results, unless stated otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from wakesleep_ext import _registrations, random  # noqa: F401  fake kernels and a vmap rule

__all__ = [
    "adam_",
    "bernoulli_log_prob",
    "bernoulli_sample",
    "binarize",
    "gaussian_kl",
    "gaussian_kl_between",
    "gaussian_log_prob",
    "gaussian_log_prob_sum",
    "gaussian_parameters",
    "gaussian_rsample",
    "gaussian_rsample_log_prob",
    "linear",
    "linear_bernoulli_log_prob",
    "linear_bernoulli_log_prob_sum",
    "linear_bernoulli_sample",
    "linear_gaussian_rsample",
    "mlp",
    "standard_gaussian_log_prob",
]

Activation = Literal["relu", "sigmoid", "tanh"]

_ops = torch.ops.wakesleep_ext


def gaussian_parameters(packed: Tensor) -> tuple[Tensor, Tensor]:
    r"""Split a packed :math:`[\mu \,|\, \ell]`, computed by a single output layer, into its two halves.

    Equivalent to ``packed.chunk(2, -1)``, with a cheaper backward pass. The Gaussian ops write the gradients of mu and
    logvar into one packed tensor. If the same op uses mu and logvar, the packed gradient is passed on without a copy.
    ``chunk`` would copy both halves into a new tensor.

    Args:
        packed: means, then log-variances, ``[*B, 2K]``.

    Returns:
        mu and logvar, ``[*B, K]`` each, as views. Do not modify them in place if ``packed`` requires a gradient.
    """
    mu, logvar = _ops.gaussian_parameters.default(packed)
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
        sample_shape: S, the shape of the samples drawn per Gaussian.
        key: the key of the noise, int64 ``[2]``.
        generator: draws the key if ``key`` is None.

    Returns:
        z, ``[*S, *B, K]``, in the dtype of the parameters.

    Gradients: :math:`\partial z/\partial\mu = 1`, :math:`\partial z/\partial\ell = (z-\mu)/2`. The noise is
    not stored: the backward pass generates it again from the key.

    Source: Kingma & Welling, "Auto-encoding variational Bayes" (2014), section 2.4.
    """
    key = random.draw_key(mu, generator) if key is None else key
    return _ops.gaussian_rsample.default(mu, logvar, key, sample_shape)


def gaussian_rsample_log_prob(
    mu: Tensor,
    logvar: Tensor,
    sample_shape: Sequence[int] = (),
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Draw samples as :func:`gaussian_rsample` does, and compute their log-density in the same pass.

    The log-density :math:`\log q(z) = -\tfrac12 \sum_k [\ell_k + \epsilon_k^2 + \log 2\pi]` is computed from the noise
    :math:`\epsilon`, not from the rounded z.

    Args:
        mu: means, ``[*B, K]``.
        logvar: log-variances, ``[*B, K]``.
        sample_shape: S, the shape of the samples drawn per Gaussian.
        key: the key of the noise, int64 ``[2]``.
        generator: draws the key if ``key`` is None.

    Returns:
        z, ``[*S, *B, K]``, in the dtype of the parameters, and log q(z), ``[*S, *B]``, in float32 or float64.

    Gradients: z has the gradients of :func:`gaussian_rsample`. The gradients of log q are total derivatives, which
    include the dependence through z: :math:`\partial/\partial\mu = 0` and :math:`\partial/\partial\ell = -\tfrac12`. To
    get the partial derivatives at fixed z, pass ``z.detach()`` to :func:`gaussian_log_prob`.
    """
    key = random.draw_key(mu, generator) if key is None else key
    return _ops.gaussian_rsample_log_prob.default(mu, logvar, key, sample_shape)


def gaussian_log_prob(mu: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
    r"""Return the log-density of a diagonal Gaussian,
    :math:`-\tfrac12 \sum_k [\ell_k + (z_k-\mu_k)^2 e^{-\ell_k} + \log 2\pi]`.

    Args:
        mu: means :math:`\mu`, ``[*B, K]``.
        logvar: log-variances :math:`\ell`, ``[*B, K]``.
        z: the points at which to evaluate the density, ``[*S, *B, K]``.

    Returns:
        ``[*S, *B]``, float32 or float64.

    Gradients: with :math:`d = (z-\mu)e^{-\ell}`, they are d for mu, :math:`\tfrac12[(z-\mu)d - 1]` for logvar and -d
    for z.
    """
    return _ops.gaussian_log_prob.default(mu, logvar, z)


def gaussian_log_prob_sum(
    mu: Tensor, logvar: Tensor, z: Tensor, sample_weight: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    r"""Return a weighted sum of Gaussian log-densities, :math:`c \sum_n w_n \log \mathcal N(z_n; \mu, \sigma^2)`.

    Equivalent to ``scale * (sample_weight * gaussian_log_prob(mu, logvar, z)).sum()``, but faster in training. Because
    the weights are known in advance, the forward pass computes the sum and its gradients in one pass.

    Args:
        mu: the mean, ``[*B, K]``.
        logvar: :math:`\log \sigma^2`, ``[*B, K]``.
        z: the value, ``[*S, *B, K]``.
        sample_weight: weights :math:`w_n` of the rows. They broadcast to ``[*S, *B]`` and are 1 by default.
        scale: c, a number, such as minus one over the number of rows for a mean.

    Returns:
        The sum, 0-dimensional, float32 or float64.

    Gradients: as for :func:`gaussian_log_prob`, with :math:`c\,w_n` in place of the upstream gradient. The gradient for
    sample_weight is :math:`c \log \mathcal N(z_n)`. All gradients are multiplied by the upstream gradient, unless it is
    known to be 1 (:func:`wakesleep_ext.gradients.unit_gradient`).
    """
    return _ops.gaussian_log_prob_sum.default(mu, logvar, z, sample_weight, scale)


def standard_gaussian_log_prob(z: Tensor) -> Tensor:
    r"""Return the log-density of N(0, I), :math:`-\tfrac12 \sum_k [z_k^2 + \log 2\pi]`.

    Args:
        z: the points at which to evaluate the density, ``[*B, K]``.

    Returns:
        ``[*B]``, float32 or float64.

    Gradient: -z for z.
    """
    return _ops.standard_gaussian_log_prob.default(z)


def gaussian_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    r"""Return the KL divergence from a diagonal Gaussian to the standard Gaussian, in nats,
    :math:`KL(N(\mu, e^\ell)\,\|\,N(0, I)) = \tfrac12 \sum_k [\mu_k^2 + e^{\ell_k} - 1 - \ell_k]`.

    Args:
        mu: means :math:`\mu`, ``[*B, K]``.
        logvar: log-variances :math:`\ell`, ``[*B, K]``.

    Returns:
        ``[*B]``, float32 or float64.

    Gradients: :math:`\mu` for mu and :math:`\tfrac12(e^\ell - 1)` for logvar.

    Source: Kingma & Welling, "Auto-encoding variational Bayes" (2014), appendix B.
    """
    return _ops.gaussian_kl.default(mu, logvar)


def gaussian_kl_between(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> Tensor:
    r"""Return the KL divergence from a diagonal Gaussian to another one, its prior, in nats,
    :math:`KL(N(\mu, e^\ell)\,\|\,N(m, e^p)) = \tfrac12 \sum_k [(\mu_k-m_k)^2 e^{-p_k} + e^{\ell_k-p_k} - 1 -
    (\ell_k-p_k)]`.

    Args:
        mu: means :math:`\mu`, ``[*B, K]``.
        logvar: log-variances :math:`\ell`, ``[*B, K]``.
        prior_mu: means :math:`m` of the prior, ``[*B, K]``.
        prior_logvar: log-variances :math:`p` of the prior, ``[*B, K]``.

    Returns:
        ``[*B]``, float32 or float64; exactly 0 if both Gaussians are equal.

    Gradients: with :math:`d = (\mu-m)e^{-p}` and :math:`r = e^{\ell-p}`, they are d for mu, :math:`\tfrac12(r - 1)` for
    logvar, -d for prior_mu and :math:`-\tfrac12[(\mu-m)d + r - 1]` for prior_logvar.
    """
    return _ops.gaussian_kl_between.default(mu, logvar, prior_mu, prior_logvar)


def bernoulli_log_prob(logits: Tensor, x: Tensor) -> Tensor:
    r"""Return the log-likelihood of independent Bernoulli variables,
    :math:`\sum_d [x_d a_d - \mathrm{softplus}(a_d)]`.

    Args:
        logits: log-odds :math:`a = \log p/(1-p)`, ``[*S, *B, D]``. Infinite logits give NaN.
        x: the observation, ``[*B, D]``; bool, uint8 with values 0 and 1, or floating point. For values between 0 and
            1, the result is the negative cross-entropy.

    Returns:
        ``[*S, *B]``, float32 or float64: float32 if the logits are of a half type.

    Gradients: :math:`x - \mathrm{sigmoid}(a)` for the logits and :math:`a` for a floating-point x.

    Source: Kingma & Welling, "Auto-encoding variational Bayes" (2014), appendix C.1.
    """
    return _ops.bernoulli_log_prob.default(logits, x)


def bernoulli_sample(
    logits: Tensor,
    sample_shape: Sequence[int] = (),
    *,
    dtype: torch.dtype | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw independent Bernoulli variables: 1 where a uniform draw is at most :math:`\mathrm{sigmoid}(a)`, else 0.

    Args:
        logits: log-odds :math:`a`, ``[*B, D]``.
        sample_shape: S, the shape of the samples drawn per vector of logits.
        dtype: dtype of the result: bool, uint8 or floating point; the dtype of the logits by default.
        key: the key of the draw, int64 ``[2]``.
        generator: draws the key if ``key`` is None.

    Returns:
        Zeros and ones, ``[*S, *B, D]``. NaN logits give 0.

    Gradients: none; the result does not require a gradient.
    """
    key = random.draw_key(logits, generator) if key is None else key
    return _ops.bernoulli_sample.default(logits, key, sample_shape, dtype)


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

    The op gathers the images of the batch and draws their pixels in one pass.

    Args:
        grey: the images, uint8 ``[N, D]``, with grey levels from 0 to ``white``.
        white: the grey level, from 1 to 255, that is always drawn as 1. Level 0 is always drawn as 0.
        index: indices of the images to draw, int64 ``[B]``; all images in order by default.
        dtype: dtype of the result: bool, uint8 or floating point; uint8 by default.
        key: the key of the draw, int64 ``[2]``.
        generator: draws the key if ``key`` is None.

    Returns:
        Zeros and ones, ``[B, D]``.

    Raises:
        IndexError: an index is out of range. On a GPU, a device-side assertion fails instead, as in torch's indexing.
    """
    key = random.draw_key(grey, generator) if key is None else key
    return _ops.binarize.default(grey, key, white, index, dtype)


def linear(h: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None = None) -> Tensor:
    r"""Apply a linear layer and its activation, :math:`y = f(hW^\top + b)`.

    With ``activation="tanh"``, the op computes ``torch.tanh(F.linear(h, weight, bias))``, but in fewer passes over
    memory. Bias and activation are applied to the GEMM's result in place. The backward pass computes :math:`\delta` and
    the gradient of the bias, which is the sum of :math:`\delta`, in one pass over memory.

    Small batches use custom kernels, and so does float32 on a CPU with AVX2. Other large batches use torch's BLAS. For
    float32 on a CPU, oneDNN replaces the BLAS if the processor has AVX-512 but the BLAS does not use AVX-512.

    Args:
        h: input, ``[*B, H]``.
        weight: W, ``[D, H]``, as in ``nn.Linear``.
        bias: b, ``[D]``, or None.
        activation: f, ``"relu"``, ``"sigmoid"`` or ``"tanh"``; None for the identity.

    Returns:
        ``[*B, D]``, in the dtype of the parameters; half types are computed in float32.

    Gradients: with :math:`\delta = g f'`, they are :math:`\delta W` for h, :math:`\delta^\top h` for weight and the sum
    of :math:`\delta` for bias, accumulated in float32 or float64. f' is computed from y, which is saved for
    the backward pass if there is an activation.

    Raises:
        ValueError: ``activation`` is none of the above.
    """
    return _ops.mlp.default(h, (weight,), (_bias(weight, bias),), None, activation)


def mlp(
    h: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activation: Activation | None = None,
    output_activation: Activation | None = None,
) -> Tensor:
    r"""Apply a chain of linear layers, each as in :func:`linear`: :math:`h_l = f(h_{l-1} W_l^\top + b_l)`.

    The op applies all layers to one chunk of rows before it starts the next chunk, so that each chunk stays in
    cache. The backward pass also proceeds chunk by chunk. For small networks, one op call with one autograd node is
    also cheaper than a separate call and node for each layer.

    Args:
        h: :math:`h_0`, ``[*B, H]``.
        weights: :math:`W_1, \dots, W_T`, ``[D, H]`` each, as in ``nn.Linear``. H equals the D of the previous layer.
        biases: :math:`b_1, \dots, b_T`, ``[D]`` each, or None.
        activation: f of every layer except the last: ``"relu"``, ``"sigmoid"`` or ``"tanh"``; None for the identity.
        output_activation: f of the last layer, with the same choices.

    Returns:
        :math:`h_T`, ``[*B, D]``, in the dtype of the parameters; half types are computed in float32.

    Gradients: as for :func:`linear`, for all layers in one call. :math:`h_1, \dots, h_{T-1}` are saved for the backward
    pass. :math:`h_T` is also saved if the last layer has an activation.

    Raises:
        ValueError: there are no layers, their shapes do not match, or an activation is none of the above.
    """
    biases = [_bias(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return _ops.mlp.default(h, weights, biases, activation, output_activation)


def linear_bernoulli_log_prob(
    h: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, *, recompute: bool | None = None
) -> Tensor:
    r"""Return the log-likelihood of a Bernoulli head: :func:`bernoulli_log_prob` with logits :math:`a = hW^\top + b`.

    For each chunk of rows, the platform's BLAS computes the logits, and the op computes the log-likelihood while the
    logits are in cache. The full matrix of logits is never in memory, unless it is saved for the backward pass (see
    ``recompute``). For half types, the GEMM returns float32 logits, which are not rounded.

    Args:
        h: the last hidden layer, ``[*S, *B, H]``. h is copied if x has leading dimensions that h lacks.
        weight: W, ``[D, H]``, as in ``nn.Linear``.
        bias: b, ``[D]``, or None.
        x: the observation, ``[*B, D]``; bool, uint8 with values 0 and 1, or floating point.
        recompute: True to recompute the logits in the backward pass, chunk by chunk. This needs no memory for the full
            logits, but takes four GEMMs instead of three. False to save the logits, in float32 or float64. None to
            save them if they take at most 4 MiB (16 MiB on a GPU), and recompute them otherwise.

    Returns:
        ``[*S, *B]``, float32 or float64: float32 if the parameters are of a half type.

    Gradients: let g be the upstream gradient of a row, and :math:`\delta = g\,(x - \mathrm{sigmoid}(a))`. The gradients
    are :math:`\delta W` for h, :math:`\delta^\top h` for weight, the sum of :math:`\delta` for bias and :math:`g a` for
    a floating-point x. They are accumulated in float32 or float64. If the loss is a weighted sum whose weights are
    known in advance, use :func:`linear_bernoulli_log_prob_sum`, which neither saves nor recomputes the logits.
    """
    bias = _bias(weight, bias)
    return _ops.linear_bernoulli_log_prob.default(h, weight, bias, x, recompute)


def linear_bernoulli_log_prob_sum(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    sample_weight: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> Tensor:
    r"""Return a weighted sum of log-likelihoods under a Bernoulli head, :math:`c \sum_n w_n \log p(x_n \mid h_n)`.

    Equivalent to ``scale * (sample_weight * linear_bernoulli_log_prob(h, weight, bias, x)).sum()``, but faster in
    training. Because the weights are known in advance, the forward pass also computes the gradients, while each chunk
    of logits is in cache. The logits are neither saved nor recomputed.

    Args:
        h: the last hidden layer, ``[*S, *B, H]``.
        weight: W, ``[D, H]``.
        bias: b, ``[D]``, or None.
        x: the observation, ``[*B, D]``; bool, uint8 with values 0 and 1, or floating point.
        sample_weight: weights :math:`w_n` of the rows, such as normalised importance weights. They broadcast to
            ``[*S, *B]`` and are 1 by default.
        scale: c, a number, such as minus one over the number of rows for a mean.

    Returns:
        The sum, 0-dimensional, float32 or float64.

    Gradients: as for :func:`linear_bernoulli_log_prob`, with :math:`c\,w_n` in place of g. The gradient for
    sample_weight is :math:`c \log p(x_n \mid h_n)`. All gradients are multiplied by the upstream gradient, unless it is
    known to be 1 (:func:`wakesleep_ext.gradients.unit_gradient`). With ``create_graph=True``, the backward pass
    recomputes the logits.
    """
    bias = _bias(weight, bias)
    return _ops.linear_bernoulli_log_prob_sum.default(h, weight, bias, x, sample_weight, scale)


def linear_bernoulli_sample(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    dtype: torch.dtype | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw from a Bernoulli head: :func:`bernoulli_sample` with logits :math:`hW^\top + b`.

    The full matrix of logits is never in memory. The same key gives the same draw as :func:`bernoulli_sample`, except
    where the two ops round the logits differently.

    Args:
        h: the last hidden layer, ``[*B, H]``.
        weight: W, ``[D, H]``.
        bias: b, ``[D]``, or None.
        dtype: dtype of the result: bool, uint8 or floating point; the dtype of the parameters by default.
        key: the key of the draw, int64 ``[2]``.
        generator: draws the key if ``key`` is None.

    Returns:
        Zeros and ones, ``[*B, D]``.

    Gradients: none; the result does not require a gradient.
    """
    key = random.draw_key(h, generator) if key is None else key
    return _ops.linear_bernoulli_sample.default(h, weight, _bias(weight, bias), key, dtype)


def linear_gaussian_rsample(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sample_shape: Sequence[int] = (),
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw from a Gaussian head: :func:`gaussian_rsample` with packed parameters
    :math:`[\mu \,|\, \ell] = hW^\top + b`.

    The draw has the same bits as :func:`linear`, :func:`gaussian_parameters` and :func:`gaussian_rsample` with the same
    key. If there are few rows and samples, a GPU computes it in one kernel, and mu and logvar are never in memory.

    Args:
        h: the last hidden layer, ``[*B, H]``.
        weight: W, ``[2K, H]``. The first K rows give :math:`\mu`, the others :math:`\ell`.
        bias: b, ``[2K]``, or None.
        sample_shape: S, the shape of the samples drawn per Gaussian.
        key: the key of the noise, int64 ``[2]``.
        generator: draws the key if ``key`` is None.

    Returns:
        z, ``[*S, *B, K]``, in the dtype of the parameters.

    Gradients: those of the three ops, which a call computes one after the other if it needs gradients.

    Raises:
        ValueError: weight has an odd number of rows.

    Source: Kingma & Welling, "Auto-encoding variational Bayes" (2014), appendix C.2.
    """
    key = random.draw_key(h, generator) if key is None else key
    return _ops.linear_gaussian_rsample.default(h, weight, _bias(weight, bias), key, sample_shape)


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
    r"""Take one step of Adam in place, for all tensors in one pass. For a parameter p with gradient g:

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1)\, g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2, \qquad
        p \leftarrow p - \frac{\mathrm{lr}}{1 - \beta_1^t}\,
        \frac{m}{\sqrt{v} / \sqrt{1 - \beta_2^t} + \epsilon}.

    The result equals the result of ``torch.optim.Adam`` up to rounding. The op computes one division per element, and
    does not synchronise with the GPU, so a CUDA graph can capture it.

    Args:
        parameters: p, of any shape, all with the same dtype. Each must fill its memory without gaps; its dimensions may
            be permuted.
        gradients: g, of the same shapes and dtype. A gradient is copied if its strides differ from its parameter's.
        exp_avgs: m, with the shapes, dtype and strides of the parameters; zeros before the first step.
        exp_avg_sqs: v, with the shapes, dtype and strides of the parameters; zeros before the first step.
        step: t, the number of this step, counted from 1; 0-dimensional, float32 or float64.
        lr: learning rate, 0-dimensional, float32 or float64.
        beta1: :math:`\beta_1`, the decay rate of m.
        beta2: :math:`\beta_2`, the decay rate of v.
        eps: :math:`\epsilon`, added to the denominator.

    Returns:
        None. p, m and v are modified in place.

    Gradients: none; call the op under ``torch.no_grad()``.

    Raises:
        ValueError: the lists differ in length, or tensors differ in shape, device or memory layout.
        TypeError: tensors differ in dtype. After any error, all tensors are unchanged.
        RuntimeError: a parameter requires a gradient, and gradients are enabled.

    Source: Kingma & Ba, "Adam: a method for stochastic optimization" (ICLR 2015), algorithm 1.
    """
    _ops.adam_.default(parameters, gradients, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, eps)


def _bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight.new_zeros(weight.shape[:1]) if bias is None else bias
