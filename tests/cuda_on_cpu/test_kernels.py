"""The CUDA kernels pass every test that takes a device, and agree with the CPU kernels."""

from __future__ import annotations

import pytest
import test_adam
import test_binarize
import test_errors
import test_gradients
import test_heads
import test_layers
import test_ops
import test_random
import test_ways
import torch
from cases import SHAPES, SMALL, Case, make_key
from emulation import count_launches, cuda_kernels, device_tests

import wakesleep_ext as ws
from wakesleep_ext._op_table import FLOATING

pytestmark = pytest.mark.source_tree

globals().update(
    device_tests(
        test_adam, test_binarize, test_ops, test_gradients, test_heads, test_layers, test_random, test_errors, test_ways
    )
)


def _launches(case: Case) -> tuple[int, int]:
    """Launches forward and backward for a small batch, whose GEMMs are our own kernels."""
    return {
        "mlp": (2, 2),
        "linear_gaussian_rsample": (2, 2),  # the gradients are those of the layer and of the draw
        "gaussian_log_prob_sum": (2, 0),  # forward also forms the gradients, that of sample_weight from log_prob
        "linear_bernoulli_log_prob": (2, 3 if case.recompute else 2),
        "linear_bernoulli_log_prob_sum": (3, 0),  # forward also forms the gradients
    }.get(case.op, (1, 1))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_launches_forward_and_backward(case: Case, device: str) -> None:
    forward, backward = _launches(case)
    assert count_launches(case.wide(40, 85)) == (forward, None if case.is_binary else backward)


# Contraction moves the polynomials by an ulp, and both normals of a pair by an ulp of the larger one.
NORMAL_ULP = 4


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("case", [case for case in SHAPES if case.draws], ids=str)
def test_draws_are_those_of_the_cpu(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype)
    on_cpu = case(*inputs)[0].double()
    with cuda_kernels():
        on_cuda = case(*inputs)[0].double()
    unequal = on_cuda != on_cpu
    if case.is_binary:
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        u = ws.random.uniforms(make_key(), on_cpu.shape, compute).double()
        wide = [tensor.double() for tensor in inputs]
        p = torch.sigmoid(torch.nn.functional.linear(*wide) if len(wide) > 1 else wide[0]).expand_as(u)
        assert ((u - p).abs() <= 4 * torch.finfo(compute).eps * p)[unequal].all()
    else:
        wide = [tensor.double() for tensor in inputs]
        _, logvar = case.row.moments(*wide)
        of_mu, of_logvar = case.row.moments(*(tensor.abs() for tensor in wide))
        rounded = of_logvar if "weight" in case.row.inputs else 0  # the terms of logvar, if the op sums them
        scale = (of_mu + (0.5 * logvar).exp() * 7 * (1 + rounded)).expand_as(on_cpu)  # bounds the terms of z
        assert ((on_cuda - on_cpu).abs() <= NORMAL_ULP * torch.finfo(dtype).eps * scale).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_normals_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    zeros = torch.zeros(100_000, dtype=dtype)
    on_cpu = ws.gaussian_rsample(zeros, zeros, key=make_key())
    with cuda_kernels():
        on_cuda = ws.gaussian_rsample(zeros, zeros, key=make_key())
    pairs = torch.stack([on_cpu, on_cuda]).view(2, -1, 2)
    larger = pairs[0].norm(dim=-1, keepdim=True)
    assert ((pairs[1] - pairs[0]).abs() <= NORMAL_ULP * torch.finfo(dtype).eps * larger).all()
