"""Check that torch's FLOP counter counts the ops like the layers and GEMMs that they replace."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import wakesleep_ext as ws
from wakesleep_ext import _flops
from wakesleep_ext.modules import BernoulliHead, Linear, fuse

B, D, H, S = 7, 11, 5, 3


def flops(function: Callable[..., Tensor], *arguments: Any, backward: bool = False) -> int:
    with FlopCounterMode(display=False) as counter:
        result = function(*arguments)
        if backward:
            result.sum().backward()
    return int(counter.get_total_flops())


def tensors(*shapes: Sequence[int], grad: str = "", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return one tensor per shape; those with a `1` in `grad` require gradients."""
    return [
        torch.randn(shape, dtype=dtype).requires_grad_(number < len(grad) and grad[number] == "1")
        for number, shape in enumerate(shapes)
    ]


def eager_mlp(h: Tensor, *layers: Tensor) -> Tensor:
    for weight, bias in zip(layers[::2], layers[1::2], strict=True):
        h = F.linear(h, weight, bias).tanh()
    return h


def mlp(h: Tensor, *layers: Tensor) -> Tensor:
    return ws.mlp(h, layers[::2], layers[1::2], "tanh", "tanh")


@pytest.mark.parametrize("batch", [(B,), (), (2, 3), (0,), (400,)], ids=str)
@pytest.mark.parametrize("sizes", [(H, D), (H, D, 4), (H, 9, 2, D)], ids=str)
@pytest.mark.parametrize("grad_h", "01")
@pytest.mark.parametrize("grad_layers", "01")
def test_layers(batch: tuple[int, ...], sizes: tuple[int, ...], grad_h: str, grad_layers: str) -> None:
    layers = [shape for fan_in, fan_out in pairwise(sizes) for shape in ((fan_out, fan_in), (fan_out,))]
    arguments = tensors((*batch, sizes[0]), *layers, grad=grad_h + grad_layers * len(layers))
    backward = "1" in grad_h + grad_layers
    expected = flops(eager_mlp, *arguments, backward=backward)
    assert flops(mlp, *arguments, backward=backward) == expected
    assert (expected > 0) == (0 not in batch)


def test_all_weights_have_gradients_if_one_has() -> None:
    """The op has a single flag for all weights, and computes all gradients or none."""
    arguments = tensors((B, 4), (5, 4), (5,), (6, 5), (6,), grad="00001")
    assert flops(mlp, *arguments, backward=True) == 2 * B * (20 + 30) + 2 * B * 30
    arguments = tensors((B, 4), (5, 4), (5,), (6, 5), (6,), grad="00010")
    assert flops(mlp, *arguments, backward=True) == 2 * (2 * B * (20 + 30)) + 2 * B * 30


def eager_log_prob(h: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return ws.bernoulli_log_prob(F.linear(h, weight, bias), x)


HEADS = pytest.mark.parametrize("shape_of_h", [(B, H), (S, B, H), (H,)], ids=str)
GRAD = pytest.mark.parametrize("grad", ["", "100", "010", "110", "111"])


@HEADS
@GRAD
@pytest.mark.parametrize("recompute", [False, True, None])
def test_a_head(shape_of_h: tuple[int, ...], grad: str, recompute: bool | None) -> None:
    """Recomputing the logits takes one more GEMM."""
    *arguments, x = tensors(shape_of_h, (D, H), (D,), (*shape_of_h[-2:-1], D), grad=grad)

    def log_prob(*arguments: Tensor) -> Tensor:
        return ws.linear_bernoulli_log_prob(*arguments, recompute=recompute)

    rows = flops(F.linear, *arguments)
    expected = flops(eager_log_prob, *arguments, x, backward="1" in grad)
    more = rows if recompute and grad else 0
    assert flops(log_prob, *arguments, x, backward="1" in grad) == expected + more


@HEADS
@GRAD
@pytest.mark.parametrize("weighted", [False, True])
def test_a_sum_forms_its_gradients_as_it_goes(shape_of_h: tuple[int, ...], grad: str, weighted: bool) -> None:
    *arguments, x, sample_weight = tensors(shape_of_h, (D, H), (D,), (D,), shape_of_h[:-1], grad=grad)
    expected = flops(eager_log_prob, *arguments, x, backward="1" in grad)
    others = (x, sample_weight) if weighted else (x,)
    assert flops(ws.linear_bernoulli_log_prob_sum, *arguments, *others) == expected
    assert flops(ws.linear_bernoulli_log_prob_sum, *arguments, *others, backward="1" in grad) == expected
    with torch.inference_mode():
        assert flops(ws.linear_bernoulli_log_prob_sum, *arguments, *others) == flops(F.linear, *arguments)


def test_a_head_whose_observation_has_more_rows() -> None:
    """Each row of h is multiplied once per observation."""
    h, weight, bias, x = tensors((B, H), (D, H), (D,), (S, B, D), grad="11")
    product = 2 * S * B * D * H
    assert flops(ws.linear_bernoulli_log_prob, h, weight, bias, x) == product
    assert flops(ws.linear_bernoulli_log_prob, h, weight, bias, x, backward=True) == 3 * product


def test_the_gradient_of_an_observation_is_a_product_of_torch() -> None:
    h, weight, bias, x = tensors((S, B, H), (D, H), (D,), (B, D), grad="0001")
    assert flops(ws.linear_bernoulli_log_prob, h, weight, bias, x, backward=True) == 2 * (S + 1) * B * D * H


@HEADS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_draw_from_a_head(shape_of_h: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = tensors(shape_of_h, (D, H), (D,), dtype=dtype)
    assert flops(ws.linear_bernoulli_sample, *arguments) == flops(F.linear, *arguments)
    packed = tensors(shape_of_h, (2 * D, H), (2 * D,), dtype=dtype)
    assert flops(ws.linear_gaussian_rsample, *packed, (3,)) == flops(F.linear, *packed)


def test_a_layer_without_bias_and_no_product_at_all() -> None:
    h, weight = tensors((5, 30), (40, 30))
    assert flops(ws.linear, h, weight, None) == 12_000
    assert flops(ws.standard_gaussian_log_prob, h) == 0


def test_layers_without_data() -> None:
    h, weight, bias = (tensor.to("meta") for tensor in tensors((B, H), (D, H), (D,)))
    assert flops(ws.linear, h, weight, bias, "tanh") == 2 * B * D * H


def test_a_model_counts_what_it_did_before_it_was_fused() -> None:
    model = nn.Sequential(nn.Linear(H, 9), nn.Tanh(), nn.Sequential(nn.Linear(9, D), nn.ReLU()), nn.Linear(D, 2))

    def counts() -> dict[str, dict[Any, int]]:
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(B, H, requires_grad=True)).sum().backward()
        return dict(counter.get_flop_counts())

    expected = counts()
    assert {"Global", "Sequential", "Sequential.0", "Sequential.2.0"} < expected.keys()
    fuse(model)
    assert counts() == expected


def test_layers_and_heads_of_ours_count_in_their_place() -> None:
    model = nn.Sequential(Linear(H, 9, activation="relu"), BernoulliHead(9, D))
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(B, H))
    counts = counter.get_flop_counts()
    assert sum(counts["Sequential.0"].values()) == 2 * B * 9 * H
    assert sum(counts["Sequential.1"].values()) == 2 * B * D * 9


def test_every_op_that_multiplies_has_a_formula() -> None:
    names = [
        name.removeprefix("wakesleep_ext::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("wakesleep_ext::")
    ]
    multiply = {
        name
        for name in names
        if any(
            argument.name in ("weight", "weights")
            for argument in getattr(torch.ops.wakesleep_ext, name).default._schema.arguments
        )
    }
    assert set(_flops.FORMULAS) == multiply - {"linear_bernoulli_log_prob_sum"}  # which is made of others


@pytest.mark.parametrize("first", ["torch.utils.flop_counter", "wakesleep_ext"])
def test_formulas_are_registered_in_any_order_of_imports(first: str) -> None:
    script = (
        f"import {first}, sys\n"
        f"assert ('torch.utils.flop_counter' in sys.modules) == {first != 'wakesleep_ext'}\n"
        "import wakesleep_ext, torch.utils.flop_counter as counter\n"
        "print(sum('wakesleep_ext' in str(op) for op in counter.flop_registry))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(found.stdout) == len(_flops.FORMULAS)
