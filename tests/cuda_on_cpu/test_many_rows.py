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


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_one_launch_for_a_product_forward_and_one_backward(case: Case, device: str) -> None:
    """Apart from the GEMMs themselves."""
    products = 2 if case.op == "mlp" else 1
    formed_before = case.op == "linear_bernoulli_log_prob_sum"  # gradients are formed in the forward pass
    backward = None if case.is_binary else 0 if formed_before else products
    assert count_launches(case.wide(40, 85)) == (products, backward)
