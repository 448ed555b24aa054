"""Compare both sides of every pair in the guides, and run the example of the landing page.

A pair is a block that defines `before` and `after`. tests/test_readme.py runs all guides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import ROOT
from torch import Tensor, nn

import wakesleep_ext as ws

pytestmark = pytest.mark.source_tree

PAIRS = ROOT / "docs/guides/move-your-code.md"


def python_blocks(page: Path) -> list[str]:
    """Return the Python blocks of a page, shifted to their lines, so that errors show the line of the page."""
    text = page.read_text()
    blocks = re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)
    return ["\n" * text.count("\n", 0, block.start(1)) + block[1] for block in blocks]


def is_pair(block: str) -> bool:
    return all(re.search(rf"^{name} = ", block, re.M) for name in ("before", "after"))


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.manual_seed(0)
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def flat(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def leaves(names: dict[str, Any]) -> list[Tensor]:
    """Return the page's tensors that require gradients, and the parameters of its modules."""
    found = [value for value in names.values() if isinstance(value, Tensor) and value.is_leaf and value.requires_grad]
    return found + [
        parameter for value in names.values() if isinstance(value, nn.Module) for parameter in value.parameters()
    ]


def gradients(values: tuple[Tensor, ...], weights: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Return gradients of a weighted sum of the values; zeros where the sum does not depend on an input."""
    total = sum((weight * value).sum() for weight, value in zip(weights, values, strict=True))
    return torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True, retain_graph=True)


def test_pairs_agree(dtype: torch.dtype) -> None:
    names: dict[str, Any] = {}
    pairs = 0
    for block in python_blocks(PAIRS):
        exec(compile(block, str(PAIRS), "exec"), names)
        if not is_pair(block):
            continue
        pairs += 1
        expected, actual = flat(names["before"]), flat(names["after"])
        line = block.count("\n") - block.lstrip("\n").count("\n") + 1
        # The example of half types returns float32 in either case.
        is_double = dtype == torch.float64 and all(value.dtype == torch.float64 for value in actual)
        tolerance = {"rtol": 1e-9, "atol": 1e-9} if is_double else {"rtol": 1e-4, "atol": 1e-3}

        def said(message: str, line: int = line) -> str:
            return f"{PAIRS.name}, line {line}: {message}"

        torch.testing.assert_close(actual, expected, **tolerance, msg=said)
        assert [value.requires_grad for value in actual] == [value.requires_grad for value in expected], said(
            "gradients"
        )
        if any(value.requires_grad for value in expected):
            weights = [torch.rand_like(value) for value in expected]
            inputs = leaves(names)
            torch.testing.assert_close(
                gradients(actual, weights, inputs), gradients(expected, weights, inputs), **tolerance, msg=said
            )
    assert pairs > 0


def test_every_op_has_a_pair() -> None:
    text = "\n".join(block for block in python_blocks(PAIRS) if is_pair(block))
    missing = [op for op in ws.ops.__all__ if not re.search(rf"\bws\.{op}\(", text)]
    assert not missing


def test_landing_page() -> None:
    names: dict[str, Any] = {}
    for block in python_blocks(ROOT / "docs/index.md"):
        exec(compile(block, "docs/index.md", "exec"), names)
    assert names["elbo"].shape == (128,)
    assert names["encoder"].weight.grad.abs().sum() > 0
