"""Test the CPU's own GEMMs of small batches through the layers that use them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import wakesleep_ext as ws
from wakesleep_ext import _C

SMALL_BATCH = 64
# rows, features and width of a layer: whole tiles and vectors, and every kind of remainder
SHAPES = [
    (1, 1, 1),
    (2, 3, 2),
    (3, 7, 49),
    (4, 8, 24),
    (5, 50, 33),
    (20, 784, 13),
    (20, 31, 200),
    (33, 97, 65),
    (63, 100, 5),
    (64, 16, 48),
]


def _layer(rows: int, features: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    h, weight = torch.randn(rows, features, dtype=dtype), torch.randn(width, features, dtype=dtype)
    return h, weight, torch.randn(width, dtype=dtype)


def _results(layer: tuple[Tensor, ...], upstream: Tensor) -> list[Tensor]:
    """Return the output of the layer, and the gradients of h, weight and bias."""
    leaves = [tensor.detach().requires_grad_() for tensor in layer]
    result = ws.linear(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, upstream)]


def _multiplies_itself() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


def _assert_exact(found: list[Tensor], layer: tuple[Tensor, ...], upstream: Tensor) -> None:
    """Check the error against the bound for a sum of rounded products in any order."""
    h, weight, bias, upstream = (tensor.double() for tensor in (*layer, upstream))
    sums = {
        "result": (h, weight.t(), bias),
        "gradient of h": (upstream, weight, torch.zeros(())),
        "gradient of weight": (upstream.t(), h, torch.zeros(())),
        "gradient of bias": (upstream.t(), torch.ones(len(h), dtype=torch.float64), torch.zeros(())),
    }
    for (what, (a, b, more)), got in zip(sums.items(), found, strict=True):
        error, terms = (got.double() - (a @ b + more)).abs(), a.abs() @ b.abs() + more.abs()
        bound = (a.shape[-1] + 1) * torch.finfo(got.dtype).eps * terms
        assert (error <= bound).all(), (what, (error / bound).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_a_small_batch(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    layer = _layer(*shape, dtype)
    upstream = torch.randn(shape[0], shape[2], dtype=dtype)
    _assert_exact(_results(layer, upstream), layer, upstream)


def test_sums_of_integers_are_exact() -> None:
    layer = tuple(tensor.round() for tensor in _layer(20, 75, 50, torch.float64))
    upstream = torch.randn(20, 50, dtype=torch.float64).round()
    h, weight, bias = layer
    expected = h @ weight.t() + bias, upstream @ weight, upstream.t() @ h, upstream.sum(0)
    assert all(map(torch.equal, _results(layer, upstream), expected))


@pytest.mark.parametrize("layout", ["transposed", "gaps", "expanded", "backwards"])
def test_products_of_operands_however_they_lie(layout: str) -> None:
    rows, features, width = 20, 30, 17
    h, weight, bias = _layer(rows, features, width)
    h, weight = {
        "transposed": (h.t().contiguous().t(), weight.t().contiguous().t()),
        "gaps": (torch.randn(rows, 2 * features)[:, ::2], torch.randn(width, features + 3)[:, 3:]),
        "expanded": (h[:1].expand(rows, -1), weight[:, :1].expand(-1, features)),
        "backwards": (h.flip(0), torch.randn(2 * width, features)[::2]),
    }[layout]
    upstream = torch.randn(rows, width)
    for given in (upstream, upstream.t().contiguous().t(), torch.ones(()).expand(rows, width)):
        _assert_exact(_results((h, weight, bias), given), (h, weight, bias), given)


def test_infinity_stays_where_it_is() -> None:
    """The padding of a vector is not multiplied with the values."""
    h, weight, bias = _layer(5, 11, 7)
    h[2, 10] = torch.inf
    found, finite = ws.linear(h, weight, bias), torch.tensor([0, 1, 3, 4])
    assert torch.equal(found[2], torch.inf * weight[:, 10].sign())
    torch.testing.assert_close(found[finite], F.linear(h[finite], weight, bias))


def test_products_are_the_same_on_any_number_of_threads() -> None:
    layer, upstream = _layer(SMALL_BATCH, 400, 300), torch.randn(SMALL_BATCH, 300)
    threads, results = torch.get_num_threads(), []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.append(_results(layer, upstream))
    torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(map(torch.equal, others, results[0]))


@pytest.mark.skipif(not _multiplies_itself(), reason="this processor has no fused multiply-adds that we use")
def test_a_row_is_the_same_by_itself() -> None:
    h, weight, bias = _layer(SMALL_BATCH, 50, 30)
    whole = ws.linear(h, weight, bias)
    for row in range(SMALL_BATCH):
        assert torch.equal(ws.linear(h[row : row + 1], weight, bias), whole[row : row + 1])


@pytest.mark.skipif(not _multiplies_itself(), reason="this processor has no fused multiply-adds that we use")
@pytest.mark.parametrize(("rows", "chosen"), [(SMALL_BATCH, None), (SMALL_BATCH + 1, None), (20, 0), (200, 200)])
def test_who_multiplies(rows: int, chosen: int | None, request: pytest.FixtureRequest) -> None:
    """Our kernels take up to 64 rows, or as many as are chosen; torch takes more."""
    request.addfinalizer(lambda: _C.set_small_batch(None))
    _C.set_small_batch(chosen)
    layer, upstream = _layer(rows, 70, 90), torch.randn(rows, 90)
    with torch.profiler.profile() as profile:
        found = _results(layer, upstream)
    by_torch = sum(event.name == "aten::mm" for event in profile.events())
    assert by_torch == (3 if rows > (SMALL_BATCH if chosen is None else chosen) else 0)
    _assert_exact(found, layer, upstream)


@pytest.mark.skipif(not _multiplies_itself(), reason="this processor has no fused multiply-adds that we use")
def test_what_is_no_number_of_rows() -> None:
    program = "import torch, wakesleep_ext as ws; ws.linear(torch.zeros(2, 3), torch.zeros(4, 3), None)"
    variables = {**os.environ, "WAKESLEEP_SMALL_BATCH": "12 or so"}
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True)
    assert "ValueError: expected WAKESLEEP_SMALL_BATCH to be a number, got '12 or so'" in done.stderr


@pytest.mark.parametrize("variable", [{"ATEN_CPU_CAPABILITY": "default"}, {"WAKESLEEP_SMALL_BATCH": "19"}], ids=str)
def test_products_are_those_of_torch_without_vectors_or_by_choice(variable: dict[str, str]) -> None:
    program = """
import torch, wakesleep_ext as ws
h, weight, bias = torch.randn(20, 30), torch.randn(17, 30), torch.randn(17)
print(torch.equal(ws.linear(h, weight, bias), torch.mm(h, weight.t()) + bias))
"""
    variables = {**os.environ, **variable}
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
