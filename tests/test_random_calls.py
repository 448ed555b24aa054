"""Check that public operators return a result or raise an error for any arguments."""

from __future__ import annotations

import subprocess
import sys

import checkout
import pytest
import torch
from cases import thorough

import wakesleep_ext as ws

pytestmark = pytest.mark.source_tree


@pytest.mark.parametrize("calls", [12, thorough(400)])
def test_random_calls_end_in_a_result_or_an_error(calls: int) -> None:
    program = f"""
import random_calls
for name in random_calls.OPERATORS:
    random_calls.make_calls(name, 1, 0, {calls})
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=checkout.ROOT / "scripts", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout.split()[-3:], done.stderr[-3000:])
    made = done.stdout.split()
    assert min(made.count("result"), made.count("error")) > len(made) // 10


def test_every_operator_is_called() -> None:
    registered = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "wakesleep_ext" in name}
    assert set(checkout.load("random_calls", "scripts").OPERATORS) == registered


def test_a_byte_other_than_one_is_true() -> None:
    logits = torch.randn(7, 70)
    x = torch.randn(7, 70) > 0
    strange = (x.to(torch.uint8) * torch.randint(1, 256, x.shape, dtype=torch.uint8)).view(torch.bool)
    assert torch.equal(ws.bernoulli_log_prob(logits, strange), ws.bernoulli_log_prob(logits, x))
    head = torch.randn(70, 5), torch.randn(70)
    h = torch.randn(7, 5)
    expected = ws.linear_bernoulli_log_prob(h, *head, x)
    assert torch.equal(ws.linear_bernoulli_log_prob(h, *head, strange), expected)


@pytest.mark.parametrize("shape", [(3, 0), (0, 3)])
def test_draws_without_elements_take_no_time(shape: tuple[int, int]) -> None:
    """The number of empty draws does not matter."""
    tensor, key = torch.zeros(shape), ws.random.make_key(1)
    assert ws.gaussian_rsample(tensor, tensor, (2**40,), key=key).shape == (2**40, *shape)
    assert ws.bernoulli_sample(tensor, (2**40,), key=key).shape == (2**40, *shape)
