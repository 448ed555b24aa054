"""List the ops, sizes, dtypes and baselines to measure.

Compilation takes seconds per case. So on a CPU, `torch.compile` is measured at only a few sizes: with 100 events or
more, where it is a serious baseline. For layers, these sizes are of the common width. It is not measured where it has
nothing to fuse: a single product, views, and objects of distributions. For Adam, torch has a fused operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wakesleep_ext._op_table import OPS
from wakesleep_ext.benchmark import classes
from wakesleep_ext.benchmark.instruments import Call
from wakesleep_ext.benchmark.op_case import Measured, OpCase

_OBSERVED, _LATENT = ((784,), (785,)), ((64,), (50,))
"""Values of D: a common one, and one that is not a multiple of the SIMD width."""
_HEADS = ((200, 784), (200, 785))
_LATENT_HEADS = ((200, 50), (200, 64))
_LAYERS = ((784, 200), (200, 784), (200, 200), (50, 200), (5, 256))

# Numbers of events. The largest arrays of memory-bound ops exceed the cache; a GPU reaches its full bandwidth at
# hundreds of megabytes. On a GPU, launch latency dominates for all smaller sizes, so one of them is enough.
_OBSERVED_ROWS = {"cpu": (1, 20, 100, 1000, 10_000), "cuda": (100, 100_000)}
_LATENT_ROWS = {"cpu": (1, 20, 100, 1000, 100_000), "cuda": (100, 1_000_000)}
_PACKED_ROWS = {"cpu": (1, 20, 100, 1000), "cuda": (100, 1000)}  # the forward pass returns views, at any size
_HEAD_ROWS = {"cpu": (1, 20, 100, 1000), "cuda": (20, 100, 1000)}
_LAYER_ROWS = {"cpu": (1, 20, 128, 1000), "cuda": (20, 128, 1000)}
_SAMPLES_AND_BATCH = (50, 100)
_COMPILED_FEW_ROWS = (100, 128)

_BFLOAT16 = {"dtype": torch.bfloat16}
_X_UINT8 = {"x_dtype": torch.uint8}
_AUTOCAST = {**_BFLOAT16, "autocast": True}
_OBSERVED_VARIANTS = ({**_BFLOAT16, **_X_UINT8}, _X_UINT8)

_MOMENTS = ("mu", "logvar")
_BOTH_MOMENTS = (*_MOMENTS, "prior_mu", "prior_logvar")
_LAYER = ("h", "weight", "bias")

_TENSORS = (784, 200, 100, 50, 200, 784, 1, 1, 1, 1, 1, 1)
"""Rows of 200 parameters in each tensor of both networks of 784-200-200-50: the weights, up to transposition, and the
biases, nearly."""


def _update(function: Callable[..., None], *tensors: Tensor) -> Call:
    """Return an Adam step on copies of the tensors, because each implementation modifies them in place.

    Every step has the same number and the same gradient. So m and v converge, a step moves a parameter by less than the
    learning rate on average, and nothing overflows however many steps are timed.
    """
    copies = [tensor.clone() for tensor in tensors]
    lists = [list(copy.split(_TENSORS)) for copy in copies]
    step, lr = (torch.tensor(number, dtype=torch.float64, device=tensors[0].device) for number in (3.0, 0.01))
    parameters, _, exp_avgs, exp_avg_sqs = copies

    def update() -> tuple[Tensor, ...]:
        function(*lists, step, lr)
        return parameters, exp_avgs, exp_avg_sqs

    return update


def _density(op: str, **fields: Any) -> Measured:
    return Measured(OPS[op], _LATENT, _LATENT_ROWS, variants=(_BFLOAT16,), **fields)


def _layer(
    op: str,
    name: str = "",
    widths: Sequence[tuple[int, int]] = _LAYERS,
    gradients: tuple[str, ...] = _LAYER,
    **options: str,
) -> Measured:
    """Measure a layer or a stack of layers with these options of the op."""
    return Measured(
        replace(OPS[op], options=options),
        widths,
        _LAYER_ROWS,
        name,
        gradients,
        baselines=("eager", "compile") if options else ("eager",),
        variants=(_BFLOAT16, _AUTOCAST),
        at_every_width=True,
    )


def _head(
    op: str,
    gradients: tuple[str, ...] = (),
    variants: Sequence[Mapping[str, Any]] = (),
    widths: Sequence[tuple[int, int]] = _HEADS,
) -> Measured:
    baselines = ("eager", "compile")
    return Measured(OPS[op], widths, _HEAD_ROWS, gradients=gradients, baselines=baselines, variants=variants)


def _class(op: str, name: str, gradients: tuple[str, ...] = ()) -> Measured:
    """Measure a class of :mod:`wakesleep_ext.distributions`, including its construction."""
    width, rows = (_OBSERVED, _OBSERVED_ROWS) if op.startswith("bernoulli") else (_LATENT, _LATENT_ROWS)
    few = dict.fromkeys(rows, (1, 100))
    return Measured(OPS[op], width[:1], few, name, gradients, baselines=("distributions",), ours=classes)


MEASURED = {
    measured.label: measured
    for measured in (
        Measured(
            OPS["bernoulli_log_prob"],
            _OBSERVED,
            _OBSERVED_ROWS,
            gradients=("logits",),
            reread=("logits", "x"),
            variants=_OBSERVED_VARIANTS,
        ),
        Measured(OPS["bernoulli_sample"], _OBSERVED, _OBSERVED_ROWS, variants=_OBSERVED_VARIANTS),
        Measured(
            OPS["binarize"],
            _OBSERVED,
            _OBSERVED_ROWS,
            baselines=("eager", "compile"),
            variants=({"x_dtype": torch.float32},),
            dtype=torch.uint8,
        ),
        Measured(OPS["gaussian_parameters"], _LATENT, _PACKED_ROWS, gradients=("packed",), baselines=("eager",)),
        _density("gaussian_rsample", gradients=_MOMENTS, reread=("logvar",)),  # the key regenerates the noise
        _density("gaussian_rsample_log_prob", gradients=_MOMENTS, reread=("logvar",)),
        _density("gaussian_log_prob", gradients=_MOMENTS, reread=("mu", "logvar", "z")),
        Measured(
            OPS["gaussian_log_prob_sum"],
            _LATENT,
            _LATENT_ROWS,
            gradients=_MOMENTS,
            baselines=("eager", "compile"),
            variants=(_BFLOAT16,),
        ),
        _density("standard_gaussian_log_prob", gradients=("z",), reread=("z",)),
        _density("gaussian_kl", gradients=_MOMENTS, reread=_MOMENTS),
        _density("gaussian_kl_between", gradients=_BOTH_MOMENTS, reread=_BOTH_MOMENTS),
        _layer("linear", widths=_LAYERS[:2]),
        _layer("linear", "linear, tanh", activation="tanh"),
        _layer(
            "mlp",
            widths=((784, 200), (50, 200)),
            gradients=(*_LAYER, "next_weight", "next_bias"),
            activation="tanh",
        ),
        _head("linear_bernoulli_log_prob", _LAYER, (*_OBSERVED_VARIANTS, {**_AUTOCAST, **_X_UINT8})),
        _head("linear_bernoulli_log_prob_sum", _LAYER, (*_OBSERVED_VARIANTS, {**_AUTOCAST, **_X_UINT8})),
        _head("linear_bernoulli_sample", variants=(*_OBSERVED_VARIANTS, _AUTOCAST)),
        _head("linear_gaussian_rsample", _LAYER, (_BFLOAT16, _AUTOCAST), _LATENT_HEADS),
        Measured(
            replace(OPS["adam_"], call=None),
            ((200,),),
            {"cpu": (sum(_TENSORS),), "cuda": (sum(_TENSORS),)},
            baselines=("eager", "torch fused"),
            bind=_update,
        ),
        _class("gaussian_rsample", "DiagonalGaussian.rsample", _MOMENTS),
        _class("gaussian_log_prob", "DiagonalGaussian.log_prob", _MOMENTS),
        _class("gaussian_kl_between", "kl_divergence", _BOTH_MOMENTS),
        _class("bernoulli_log_prob", "BernoulliVector.log_prob", ("logits",)),
        _class("bernoulli_sample", "BernoulliVector.sample"),
    )
}
"""What is measured, keyed by the name in tables. `OPS` defines the inputs and outputs of each op."""


def cases(device: str = "cpu", quick: bool = False) -> list[OpCase]:
    """Return all cases for a device type, `"cpu"` or `"cuda"`.

    If quick, return only the largest float32 case of each op, with gradients if the op has any.
    """
    return [case for measured in MEASURED.values() for case in _cases(measured, device, quick)]


def _cases(measured: Measured, device: str, quick: bool) -> Iterator[OpCase]:
    width, *others = measured.widths
    *few, most = measured.rows[device]
    is_gpu = device == "cuda"
    passes = (False, True) if measured.gradients else (False,)
    for backward in passes[-1:] if quick else passes:
        case = partial(OpCase, measured, dtype=measured.dtype, backward=backward)
        largest = case((most, *width))
        yield largest
        if quick:
            continue
        for variant in measured.variants:
            yield replace(largest, compiles=is_gpu or not measured.multiplies, **variant)
        for other in others:
            yield case((most, *other), compiles=is_gpu or not measured.multiplies)
        if measured.broadcasts_samples:
            yield case((*_SAMPLES_AND_BATCH, *width))
        for of_width in measured.widths if measured.at_every_width else (width,):
            for rows in few:
                yield case((rows, *of_width), compiles=is_gpu or (rows in _COMPILED_FEW_ROWS and of_width == width))
