"""Layers and heads use the BLAS, as they do for large batches, on batches small enough for a test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_heads
import test_layers
from cases import SMALL, Case
from emulation import count_launches, device_tests

from wakesleep_ext import _C

pytestmark = pytest.mark.source_tree

globals().update(device_tests(test_heads, test_layers))


@pytest.fixture(autouse=True)
def _no_batch_is_small() -> Iterator[None]:
    _C.set_small_batch(0)
    yield
    _C.set_small_batch(None)


@pytest.mark.parametrize("case", [case for case in SMALL if case.op.startswith(("linear", "mlp"))], ids=str)
def test_launches_per_product(case: Case, device: str) -> None:
    """Apart from the GEMMs: one launch forward, and two backward, of which one adds the partial sums of the other.

    If a layer has no activation, its GEMM adds the bias.
    """
    products = 2 if case.op == "mlp" else 1
    expected: tuple[int, int | None] = (products, 2 * products)
    if case.op == "linear_bernoulli_log_prob_sum":  # gradients are formed in the forward pass
        expected = (2 * products, 0)
    elif case.is_binary:
        expected = (products, None)
    elif case.op == "linear" and case.activation is None:
        expected = (0, 2 * products)
    elif case.op == "linear_gaussian_rsample":  # such a layer, and a draw
        expected = (1, 2 * products + 1)
    assert count_launches(case.wide(40, 85)) == expected
