"""Test the CPU's own GEMMs through the layers that use them."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import wakesleep_ext as ws
from wakesleep_ext import _C, reference

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
    (65, 200, 50),
    (209, 257, 47),  # several blocks of rows and of features
]


@pytest.fixture(params=[None, 0, 64], ids=["skinny up to the limit", "packed", "skinny up to 64 rows"])
def limit(request: pytest.FixtureRequest) -> Iterator[int | None]:
    """Choose the rows up to which the skinny GEMM computes every product."""
    _C.set_small_batch(request.param)
    yield request.param
    _C.set_small_batch(None)


@pytest.fixture
def always_packed() -> Iterator[None]:
    _C.set_small_batch(0)
    yield
    _C.set_small_batch(None)


@pytest.fixture
def always_skinny() -> Iterator[None]:
    _C.set_small_batch(10**6)
    yield
    _C.set_small_batch(None)


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


def _packs() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


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
def test_products_of_a_layer(shape: tuple[int, int, int], dtype: torch.dtype, limit: int | None) -> None:
    layer = _layer(*shape, dtype)
    upstream = torch.randn(shape[0], shape[2], dtype=dtype)
    _assert_exact(_results(layer, upstream), layer, upstream)


def test_products_of_every_ragged_size(always_packed: None) -> None:
    """Cover all numbers of rows and columns up to a tile and beyond it, for each of the three products."""
    for rows, features, width in itertools.product((*range(1, 9), 13), (1, 2, 7, 8, 9, 17), range(1, 18)):
        layer, upstream = _layer(rows, features, width), torch.randn(rows, width)
        _assert_exact(_results(layer, upstream), layer, upstream)


def test_gradients_add_up_over_chunks(small_chunks: None, always_packed: None) -> None:
    """Chunks have 32 rows. A second layer adds up the outputs of the first, because one layer may be a single chunk."""
    width = 2**20 // 4 // 32 - 3
    layer, upstream = _layer(71, 3, width), torch.randn(71, 1)
    h, weight, bias = (tensor.detach().requires_grad_() for tensor in layer)
    total = ws.mlp(h, [weight, torch.ones(1, width)], [bias, torch.zeros(1)], None)
    gradients = torch.autograd.grad(total, (h, weight, bias), upstream)
    _assert_exact([ws.linear(*layer), *gradients], layer, upstream.expand(-1, width))


def test_a_chunk_of_any_size_holds_all_rows(request: pytest.FixtureRequest) -> None:
    request.addfinalizer(lambda: _C.set_chunk_mib(None))
    layer, calls = _layer(100, 3, 2**20 // 4 // 32, torch.float64), []
    for size in (1, 2**20, 2**63 - 1):
        _C.set_chunk_mib(size)
        with torch.profiler.profile() as profile:
            ws.linear(*layer, "tanh")
        calls.append(sum(event.name == "aten::mm" for event in profile.events()))
    assert calls == [4, 1, 1]


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
def test_activations_of_products(activation: str, always_packed: None) -> None:
    layer = _layer(50, 300, 41)
    expected = getattr(torch, activation)(F.linear(*(tensor.double() for tensor in layer)))
    torch.testing.assert_close(ws.linear(*layer, activation).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_of_integers_are_exact(dtype: torch.dtype, limit: int | None) -> None:
    layer = tuple(tensor.round() for tensor in _layer(20, 75, 50, dtype))
    upstream = torch.randn(20, 50, dtype=dtype).round()
    h, weight, bias = layer
    expected = h @ weight.t() + bias, upstream @ weight, upstream.t() @ h, upstream.sum(0)
    assert all(map(torch.equal, _results(layer, upstream), expected))


@pytest.mark.parametrize("layout", ["transposed", "gaps", "expanded", "backwards"])
def test_products_of_operands_however_they_lie(layout: str, limit: int | None) -> None:
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


@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
def test_a_value_that_is_not_finite_stays_in_its_row(value: float, limit: int | None) -> None:
    """The padding of a vector or a tile is not multiplied with the values."""
    h, weight, bias = _layer(5, 11, 7)
    h[2, 10] = value
    found, finite = ws.linear(h, weight, bias), torch.tensor([0, 1, 3, 4])
    assert torch.equal(found[2].nan_to_num(7, 8, 9), (value * weight[:, 10].sign()).nan_to_num(7, 8, 9))
    torch.testing.assert_close(found[finite], F.linear(h[finite], weight, bias))


@pytest.mark.parametrize("rows", [12, 250])
def test_products_are_the_same_on_any_number_of_threads(rows: int) -> None:
    layer, upstream = _layer(rows, 400, 300), torch.randn(rows, 300)
    threads, results = torch.get_num_threads(), []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.append(_results(layer, upstream))
    torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(map(torch.equal, others, results[0]))


@pytest.mark.skipif(not _multiplies_itself(), reason="this processor has no fused multiply-adds that we use")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_row_is_the_same_by_itself(dtype: torch.dtype, always_skinny: None) -> None:
    h, weight, bias = _layer(27, 50, 32, dtype)
    whole = ws.linear(h, weight, bias)
    for row in range(27):
        assert torch.equal(ws.linear(h[row : row + 1], weight, bias), whole[row : row + 1])


@pytest.mark.skipif(not _packs(), reason="the packed GEMM needs AVX2 and is not used with AVX-512")
def test_a_row_of_a_packed_product_is_the_same_by_itself(always_packed: None) -> None:
    h, weight, bias = _layer(250, 300, 30)
    whole = ws.linear(h, weight, bias)
    for row in (0, 5, 6, 249):
        assert torch.equal(ws.linear(h[row : row + 1], weight, bias), whole[row : row + 1])


@pytest.mark.skipif(not _packs(), reason="the packed GEMM needs AVX2 and is not used with AVX-512")
@pytest.mark.parametrize("rows", [24, 25, 500])
def test_torch_multiplies_no_layer_in_float32(rows: int) -> None:
    layer, upstream = _layer(rows, 70, 90), torch.randn(rows, 90)
    with torch.profiler.profile() as profile:
        _results(layer, upstream)
    assert not any(event.name in ("aten::mm", "aten::addmm") for event in profile.events())


@pytest.mark.skipif(not _multiplies_itself(), reason="this processor has no fused multiply-adds that we use")
@pytest.mark.parametrize(
    ("rows", "chosen", "expected"), [(4, None, 0), (5, None, 1), (25, None, 3), (20, 0, 3), (200, 200, 0)]
)
def test_who_multiplies(rows: int, chosen: int | None, expected: int, request: pytest.FixtureRequest) -> None:
    """In float64, torch multiplies if there are more rows than chosen, or than a 16th of the features.

    For the two products of the gradient, the limit is 12 or 24.
    """
    request.addfinalizer(lambda: _C.set_small_batch(None))
    _C.set_small_batch(chosen)
    layer, upstream = _layer(rows, 70, 90, torch.float64), torch.randn(rows, 90, dtype=torch.float64)
    with torch.profiler.profile() as profile:
        found = _results(layer, upstream)
    by_torch = sum(event.name in ("aten::mm", "aten::addmm") for event in profile.events())
    assert by_torch == expected
    _assert_exact(found, layer, upstream)


@pytest.mark.skipif(not _multiplies_itself(), reason="this processor has no fused multiply-adds that we use")
def test_what_is_no_number_of_rows() -> None:
    expected = "expected WAKESLEEP_SMALL_BATCH to be a number of at least 0, got"
    with pytest.raises(ValueError, match=f"{expected} -1"):
        _C.set_small_batch(-1)
    program = "import torch, wakesleep_ext as ws; ws.linear(torch.zeros(2, 3), torch.zeros(4, 3), None)"
    variables = {**os.environ, "WAKESLEEP_SMALL_BATCH": "12 or so"}
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True)
    assert f"ValueError: {expected} '12 or so'" in done.stderr


@pytest.mark.parametrize("variable", [{"ATEN_CPU_CAPABILITY": "default"}, {"WAKESLEEP_SMALL_BATCH": "19"}], ids=str)
def test_products_are_those_of_torch_without_vectors_or_by_choice(variable: dict[str, str]) -> None:
    program = """
import torch, wakesleep_ext as ws
torch.set_default_dtype(torch.float64)
h, weight, bias = torch.randn(20, 30), torch.randn(17, 30), torch.randn(17)
print(torch.equal(ws.linear(h, weight, bias), torch.mm(h, weight.t()) + bias))
"""
    variables = {**os.environ, **variable}
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


@pytest.mark.parametrize("rows", [8, 20, 100])
def test_a_long_sum_is_added_in_parts(rows: int) -> None:
    """One chain of 784 additions loses four times as much to rounding. More rows than fit our GEMM go to the BLAS."""
    torch.manual_seed(0)
    weight, upstream = torch.randn(784, 200) / 200**0.5, torch.randn(rows, 784)
    h = torch.randn(rows, 200, requires_grad=True)
    (found,) = torch.autograd.grad(ws.linear(h, weight, torch.zeros(784)), h, upstream)
    exact = upstream.double() @ weight.double()
    error_of_blas = (upstream @ weight - exact).abs().max()
    assert (found - exact).abs().max() <= torch.maximum(error_of_blas, 4e-7 * exact.abs().max())


needs_bfloat16 = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="this processor does not multiply bfloat16"
)


def _assert_as_exact_as_torch(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], rows: int, names: Sequence[str]
) -> None:
    """Check the output of a large bfloat16 layer and its gradients.

    The error is at most twice the error of plain torch in bfloat16, plus a rounding.
    """
    layer = _layer(rows, 70, 90, torch.bfloat16)

    def results(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in layer]
        y = function(*leaves)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).bfloat16().to(y.dtype)
        return [y, *torch.autograd.grad(y, leaves, upstream)]

    with torch.profiler.profile() as profile:
        found = results(ours, torch.bfloat16)
    assert {event.name for event in profile.events()}.issuperset(names)
    for got, eager, exact in zip(found, results(plain, torch.bfloat16), results(plain, torch.float64), strict=True):
        rounding = exact.abs().max() * torch.finfo(got.dtype).eps
        assert (got - exact).abs().max() <= 2 * (eager - exact).abs().max() + rounding


@needs_bfloat16
@pytest.mark.parametrize("activation", [None, "relu", "sigmoid", "tanh"])
def test_onednn_computes_a_large_layer_in_bfloat16(activation: str | None) -> None:
    def plain(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        products = F.linear(h, weight, bias)
        return products if activation is None else getattr(torch, activation)(products)

    def ours(*layer: Tensor) -> Tensor:
        return ws.linear(*layer, activation)

    _assert_as_exact_as_torch(ours, plain, 300, ["mkldnn::_linear_pointwise", "aten::mm"])


@needs_bfloat16
@pytest.mark.parametrize("sizes", [(0, 300, 90), (70, 0, 90), (70, 300, 0)], ids=str)
def test_an_empty_layer_of_a_large_mlp_in_bfloat16(sizes: tuple[int, ...]) -> None:
    """oneDNN rejects a layer without inputs."""
    sizes = (*sizes, 300, 300)
    shapes = [(width, features) for features, width in pairwise(sizes)]
    weights, biases = [torch.randn(shape) / 20 for shape in shapes], [torch.randn(width) for width, _ in shapes]
    h, *parameters = (tensor.bfloat16().requires_grad_() for tensor in (torch.randn(100, sizes[0]), *weights, *biases))
    found = ws.mlp(h, parameters[:4], parameters[4:], "tanh", "tanh")
    expected = reference.mlp(
        h.double(), [w.double() for w in parameters[:4]], [b.double() for b in parameters[4:]], "tanh", "tanh"
    )
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)
    gradients = (torch.autograd.grad(y.sum(), (h, *parameters)) for y in (found, expected))
    torch.testing.assert_close(*gradients, rtol=0.05, atol=0.5)


@needs_bfloat16
@pytest.mark.thorough
def test_onednn_may_be_told_not_to_multiply_bfloat16() -> None:
    """Without AVX-512, oneDNN rejects layers in bfloat16, so we multiply them in float32."""
    program = """
import torch, wakesleep_ext as ws
h, weight, bias = (torch.randn(shape).bfloat16() for shape in ((1000, 100), (90, 100), (90,)))
exact = torch.nn.functional.linear(h.float(), weight.float(), bias.float()).tanh()
print(torch.allclose(ws.linear(h, weight, bias, "tanh").float(), exact, atol=2**-8))
"""
    variables = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


@needs_bfloat16
@pytest.mark.parametrize("rows", [300, 6000], ids=["one chunk", "several chunks"])
def test_gradients_of_a_large_head_are_multiplied_in_bfloat16(rows: int) -> None:
    x = torch.rand(rows, 90).round()

    def ours(*layer: Tensor) -> Tensor:
        return ws.linear_bernoulli_log_prob(*layer, x)

    def plain(*layer: Tensor) -> Tensor:
        logits = F.linear(*layer)
        return -F.binary_cross_entropy_with_logits(logits, x.to(logits.dtype), reduction="none").sum(-1)

    _assert_as_exact_as_torch(ours, plain, rows, ["aten::mm"])
    h, weight, bias = _layer(rows, 70, 90, torch.bfloat16)
    exact = plain(h.double(), weight.double(), bias.double())
    torch.testing.assert_close(ours(h, weight, bias).double(), exact, rtol=1e-5, atol=1e-3)
