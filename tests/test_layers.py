"""Compare hidden layers with the two ops that they replace: exact for any number of chunks, and in any context."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import wakesleep_ext as ws
from wakesleep_ext import reference
from wakesleep_ext.benchmark.instruments import peak_bytes

CHUNK = 32  # minimum rows per chunk


def _layer(rows: int, features: int, width: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return h, weight and bias that require gradients."""
    options = {"dtype": dtype, "device": device, "requires_grad": True}
    shapes = (rows, features), (width, features), (width,)
    h, weight, bias = (torch.randn(shape, **options) for shape in shapes)
    return h, weight, bias


def test_a_layer_in_several_chunks(device: str, small_chunks: None) -> None:
    dtype = torch.float64
    layer = _layer(2 * CHUNK + 7, 3, 2**20 // dtype.itemsize // CHUNK - 3, dtype, device)
    found, expected = ws.linear(*layer, "tanh"), F.linear(*layer).tanh()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    upstream = torch.randn_like(found)
    gradients = torch.autograd.grad(found, layer, upstream)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, layer, upstream), rtol=1e-11, atol=1e-11)


def test_memory_of_gradients_in_float32_does_not_grow_with_the_rows(small_chunks: None) -> None:
    """Besides the gradients of the arguments, a pass allocates one chunk, for any number of rows."""

    def beyond_gradients(rows: int) -> int:
        layer = _layer(rows, 4, 300, torch.float32, "cpu")
        y = ws.linear(*layer, "tanh")
        upstream = torch.ones_like(y)
        peak = peak_bytes(lambda: torch.autograd.grad(y, layer, upstream, retain_graph=True), torch.device("cpu"))
        return peak - sum(tensor.nbytes for tensor in layer)

    assert beyond_gradients(20_000) <= beyond_gradients(5_000) + 2**19


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layers_of_half_types_are_summed_in_float32(dtype: torch.dtype, device: str, small_chunks: None) -> None:
    """A sum over thousands of rows in bfloat16 would stop growing long before the end."""
    layer = _layer(5000, 4, 9, dtype, device)
    exact = [tensor.detach().double().requires_grad_() for tensor in layer]
    found, expected = ws.linear(*layer, "tanh"), reference.linear(*exact, "tanh")
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() <= torch.finfo(dtype).eps
    gradients = torch.autograd.grad(found.float().sum(), layer)
    for got, wanted in zip(gradients, torch.autograd.grad(expected.sum(), exact), strict=True):
        assert (got.double() - wanted).abs().max() <= 4 * torch.finfo(dtype).eps * wanted.abs().max()


def test_gradients_of_a_layer_go_where_they_are_asked_for(device: str) -> None:
    layer = _layer(6, 4, 5, torch.float64, device)
    everything = torch.autograd.grad(ws.linear(*layer, "tanh").sum(), layer)
    for index in range(3):
        alone = [tensor.detach().requires_grad_(i == index) for i, tensor in enumerate(layer)]
        (gradient,) = torch.autograd.grad(ws.linear(*alone, "tanh").sum(), alone[index])
        torch.testing.assert_close(gradient, everything[index])


def test_a_layer_without_bias(device: str) -> None:
    h, weight, _ = _layer(6, 4, 5, torch.float64, device)
    torch.testing.assert_close(ws.linear(h, weight, None), F.linear(h, weight))


def test_a_layer_under_autocast(device: str) -> None:
    """Like nn.Linear, a layer multiplies in the lower precision and returns it."""
    layer = _layer(6, 40, 5, torch.float32, device)
    lower = [tensor.detach().bfloat16().requires_grad_() for tensor in layer]
    with torch.autocast(device, torch.bfloat16):
        found = ws.linear(*layer, "tanh")
    expected = ws.linear(*lower, "tanh")
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    gradients = torch.autograd.grad(found.float().sum(), layer)
    for got, wanted in zip(gradients, torch.autograd.grad(expected.float().sum(), lower), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, wanted.float())


def test_gradients_of_each_row_of_a_layer_by_vmap(device: str) -> None:
    h, weight, bias = (tensor.detach() for tensor in _layer(4, 3, 5, torch.float64, device))

    def of_each(module: object) -> tuple[Tensor, ...]:
        def loss(weight: Tensor, bias: Tensor, h: Tensor) -> Tensor:
            return module.linear(h, weight, bias, "tanh").sin().sum()

        return torch.vmap(torch.func.grad(loss, (0, 1, 2)), in_dims=(None, None, 0))(weight, bias, h)

    torch.testing.assert_close(of_each(ws), of_each(reference))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("layout", ["plain", "transposed", "gaps", "overlapping"])
def test_large_products_whoever_multiplies(layout: str) -> None:
    """oneDNN multiplies large float32 batches if it is available and enabled, and MKL does not use AVX-512."""
    processor = Path("/proc/cpuinfo").read_text()
    is_better = torch.backends.mkl.is_available() and "avx512f" in processor and "GenuineIntel" not in processor
    rows, features, width = 130, 90, 100
    h, weight = torch.randn(rows, features), torch.randn(width, features)
    h, weight = {
        "plain": (h, weight),
        "transposed": (h.t().contiguous().t(), weight.t().contiguous().t()),
        "gaps": (torch.randn(rows, 2 * features)[:, ::2], torch.randn(width, features + 3)[:, 3:]),
        "overlapping": (h[:1].expand(rows, -1), weight[:, :1].expand(-1, features)),
    }[layout]
    layer = h.requires_grad_(), weight.requires_grad_(), torch.randn(width, requires_grad=True)
    exact = [tensor.detach().double().requires_grad_() for tensor in layer]
    expected = F.linear(*exact).tanh()
    upstream = torch.randn(rows, width)
    expected_gradients = torch.autograd.grad(expected, exact, upstream.double())
    for enabled in (True, False):
        with torch.backends.mkldnn.flags(enabled=enabled), torch.profiler.profile() as profile:
            found = ws.linear(*layer, "tanh")
            gradients = torch.autograd.grad(found, layer, upstream)
        by_onednn = any(event.name == "mkldnn::_linear_pointwise" for event in profile.events())
        assert by_onednn == (enabled and layout != "overlapping" and is_better)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        for got, wanted in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-4)


def test_activations_at_their_ends(device: str) -> None:
    """NaN stays NaN as in torch. A saturated activation has zero gradient for any upstream gradient."""
    values = torch.tensor([[-torch.inf], [-90.0], [0.0], [90.0], [torch.inf], [torch.nan]], device=device)
    one, none = torch.ones(1, 1, device=device), torch.zeros(1, device=device)
    for activation in ("relu", "sigmoid", "tanh"):
        expected = getattr(torch, activation)(values)
        torch.testing.assert_close(ws.linear(values, one, none, activation), expected, equal_nan=True)
    bias = torch.tensor([-1.0], device=device, requires_grad=True)
    ws.linear(none[None], one, bias, "relu").backward(torch.full((1, 1), torch.inf, device=device))
    assert bias.grad == 0


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"linear: expected activation to be None, 'relu', .*, got 'gelu'"):
        ws.linear(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(5), "gelu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"linear: expected the last dimension of h to be 4, .*, got 3"):
        ws.linear(torch.zeros(2, 3), torch.zeros(5, 4), torch.zeros(5))
    with pytest.raises(TypeError, match=r"linear: expected h to be float64, .*, got Int"):
        ws.linear(torch.zeros(2, 3, dtype=torch.int32), torch.zeros(5, 3), torch.zeros(5))
