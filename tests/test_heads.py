"""Compare Bernoulli heads with the two ops that they replace: exact for any number of chunks, with little memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import make_key
from torch import Tensor
from torch.nn import functional as F

import wakesleep_ext as ws
from wakesleep_ext import reference
from wakesleep_ext._op_table import FLOATING
from wakesleep_ext.benchmark.instruments import peak_bytes
from wakesleep_ext.gradients import unit_gradient

CHUNK = 32  # minimum rows per chunk


def _head(
    leading: tuple[int, ...], features: int, width: int, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return h, weight and bias that require gradients, and a binary x."""
    options = {"dtype": dtype, "device": device}
    h = torch.randn(*leading, features, **options, requires_grad=True)
    weight = torch.randn(width, features, **options, requires_grad=True)
    bias = torch.randn(width, **options, requires_grad=True)
    return h, weight, bias, (torch.rand(leading[-1], width, device=device) < 0.3).to(torch.uint8)


def _several_chunks(device: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width = 2**20 // dtype.itemsize // CHUNK
    h, weight, bias, x = _head((3, CHUNK - 5), 3, width - 3, dtype, device)
    assert 2 * CHUNK < h[..., 0].numel() < 3 * CHUNK
    return h, weight, bias, x


RECOMPUTE = pytest.mark.parametrize("recompute", [None, True, False])


@RECOMPUTE
def test_any_weight_for_each_row_is_exact(recompute: bool | None, device: str, small_chunks: None) -> None:
    h, weight, bias, x = _several_chunks(device)
    upstream = torch.randn(h.shape[:-1], dtype=torch.float64, device=device)
    expected = ws.bernoulli_log_prob(F.linear(h, weight, bias), x)
    found = ws.linear_bernoulli_log_prob(h, weight, bias, x, recompute=recompute)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    parameters = (h, weight, bias)
    gradients = torch.autograd.grad(found, parameters, upstream)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, parameters, upstream), rtol=1e-12, atol=1e-11)


@RECOMPUTE
def test_a_gradient_for_one_argument_alone_is_the_same(recompute: bool | None, device: str) -> None:
    *parameters, x = _head((5, 4), 3, 7, device=device)
    found = ws.linear_bernoulli_log_prob(*parameters, x, recompute=recompute).sum()
    together = torch.autograd.grad(found, parameters, retain_graph=True)
    alone = [torch.autograd.grad(found, parameter, retain_graph=True)[0] for parameter in parameters]
    torch.testing.assert_close(alone, list(together))


def test_a_weighted_sum_is_exact(device: str, small_chunks: None) -> None:
    h, weight, bias, x = _several_chunks(device)
    sample_weight = torch.randn(h.shape[:-1], dtype=torch.float64, device=device, requires_grad=True)
    log_prob = ws.bernoulli_log_prob(F.linear(h, weight, bias), x)
    for weights, expected in ((sample_weight, (sample_weight * log_prob).sum()), (None, log_prob.sum())):
        found = ws.linear_bernoulli_log_prob_sum(h, weight, bias, x, weights)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9)
        parameters = (h, weight, bias) if weights is None else (h, weight, bias, weights)
        gradients = torch.autograd.grad(-3 * found, parameters)
        wanted = torch.autograd.grad(-3 * expected, parameters, retain_graph=True)
        torch.testing.assert_close(gradients, wanted, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("x_dtype", [torch.float64, torch.uint8], ids=str)
@pytest.mark.parametrize("rows", [1, 23, 300])
def test_a_sum_whose_weights_have_no_gradient_is_exact(rows: int, x_dtype: torch.dtype, device: str) -> None:
    h, weight, bias, x = _head((2, rows), 7, 85, device=device)
    x = x.to(x_dtype)
    sample_weight = torch.randn(rows, dtype=torch.float64, device=device)
    log_prob = ws.bernoulli_log_prob(F.linear(h, weight, bias), x)
    for weights, scale in ((None, -1 / rows), (sample_weight, 1.0), (sample_weight, 2.5)):
        found = ws.linear_bernoulli_log_prob_sum(h, weight, bias, x, weights, scale=scale)
        expected = scale * (log_prob if weights is None else weights * log_prob).sum()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9)
        with torch.no_grad():
            without = ws.linear_bernoulli_log_prob_sum(h, weight, bias, x, weights, scale=scale)
        torch.testing.assert_close(without, expected.detach(), rtol=1e-12, atol=1e-9)
        gradients = torch.autograd.grad(found, (h, weight, bias))
        wanted = torch.autograd.grad(expected, (h, weight, bias), retain_graph=True)
        torch.testing.assert_close(gradients, wanted, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("rows", [1, 23, 400])
def test_a_sum_of_gaussian_log_densities_is_exact(rows: int, device: str) -> None:
    generator = torch.Generator(device).manual_seed(0)
    mu, logvar, z = torch.randn(3, 2, rows, 21, dtype=torch.float64, device=device, generator=generator).unbind()
    inputs = [tensor.requires_grad_() for tensor in (mu[0], logvar, z)]
    sample_weight = torch.randn(rows, dtype=torch.float64, device=device)
    for weights, scale in ((None, -1 / rows), (sample_weight, 1.0), (sample_weight, 2.5)):
        log_prob = reference.gaussian_log_prob(*inputs)
        found = ws.gaussian_log_prob_sum(*inputs, weights, scale=scale)
        expected = scale * (log_prob if weights is None else weights * log_prob).sum()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9)
        gradients = torch.autograd.grad(-3 * found, inputs)
        torch.testing.assert_close(gradients, torch.autograd.grad(-3 * expected, inputs), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("op", ["head", "gaussian"])
def test_an_upstream_gradient_of_one_is_recognised_until_it_changes(op: str, device: str) -> None:
    if op == "head":
        leaf, *others = _head((5,), 3, 7, device=device)
        call = partial(ws.linear_bernoulli_log_prob_sum, leaf, *others)
    else:
        leaf = torch.randn(5, 7, dtype=torch.float64, device=device, requires_grad=True)
        call = partial(ws.gaussian_log_prob_sum, leaf, torch.zeros_like(leaf), torch.ones_like(leaf))

    def gradient(upstream: Tensor | None) -> Tensor:
        return torch.autograd.grad(call(), leaf, upstream)[0]

    one = unit_gradient(device, torch.float64)
    expected = gradient(None)
    assert torch.equal(gradient(one), expected)
    assert torch.equal(gradient(-one), -expected)
    torch.testing.assert_close(torch.autograd.grad(call().expand(3), leaf, one.expand(3))[0], 3 * expected)
    one.mul_(2)
    assert torch.equal(gradient(one), 2 * expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_draws_are_those_of_bernoulli_sample(dtype: torch.dtype, device: str, small_chunks: None) -> None:
    """An element's random word depends on its index only, not on chunks. So draws differ only if rounding moves a logit
    past the uniform.
    """
    h, weight, bias, _ = _several_chunks(device, dtype)
    logits = F.linear(h, weight, bias)
    expected = ws.bernoulli_sample(logits, key=make_key(device))
    for asked in (None, torch.bool, torch.uint8, torch.bfloat16):
        found = ws.linear_bernoulli_sample(h, weight, bias, dtype=asked, key=make_key(device))
        assert found.dtype == (asked or dtype)
        unequal = found.to(dtype) != expected
        u = ws.random.uniforms(make_key(device), logits.shape, torch.float64)
        near = (u - logits.sigmoid().double()).abs() < 8 * torch.finfo(dtype).eps
        assert (near | ~unequal).all()
        assert unequal.sum() < 10


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize(
    ("leading", "features", "latent", "sample_shape"),
    [((20,), 20, 6, ()), ((2, 15), 7, 5, (3,)), ((3,), 4, 5, (17, 3)), ((300,), 20, 50, (2, 2))],
)
def test_draws_of_a_gaussian_head_are_those_of_two_ops(
    leading: tuple[int, ...],
    features: int,
    latent: int,
    sample_shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
) -> None:
    """Every bit is the same, with or without gradients. The gradients are the same, too."""
    head = _head(leading, features, 2 * latent, dtype, device)[:3]
    parameters = ws.gaussian_parameters(ws.linear(*head))
    expected = ws.gaussian_rsample(*parameters, sample_shape, key=make_key(device))
    with torch.no_grad():
        drawn = ws.linear_gaussian_rsample(*head, sample_shape, key=make_key(device))
    assert drawn.shape == (*sample_shape, *leading, latent)
    assert torch.equal(drawn, expected)
    found = ws.linear_gaussian_rsample(*head, sample_shape, key=make_key(device))
    assert torch.equal(found, expected)
    upstream = torch.randn_like(found)
    gradients = zip(*(torch.autograd.grad(z, head, upstream) for z in (found, expected)), strict=True)
    assert all(torch.equal(a, b) for a, b in gradients)


def test_draws_follow_the_generator(device: str) -> None:
    h, weight, bias, _ = _head((50,), 3, 7, torch.float32, device)
    torch.manual_seed(4)
    first, second = (ws.linear_bernoulli_sample(h, weight, bias) for _ in range(2))
    torch.manual_seed(4)
    assert torch.equal(first, ws.linear_bernoulli_sample(h, weight, bias))
    assert not torch.equal(first, second)
    generator = torch.Generator(device).manual_seed(4)
    z, other = (ws.linear_gaussian_rsample(h, weight[:6], bias[:6], generator=generator) for _ in range(2))
    generator.manual_seed(4)
    assert torch.equal(z, ws.linear_gaussian_rsample(h, weight[:6], bias[:6], generator=generator))
    assert not torch.equal(z, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_summed_in_float32(dtype: torch.dtype, device: str, small_chunks: None) -> None:
    """A sum over thousands of rows in bfloat16 would stop growing long before the end."""
    h, weight, bias, x = _head((5, 1000), 4, 9, dtype, device)
    exact = [tensor.detach().double().requires_grad_() for tensor in (h, weight, bias)]
    found = ws.linear_bernoulli_log_prob(h, weight, bias, x)
    expected = reference.linear_bernoulli_log_prob(*exact, x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(found.sum(), (h, weight, bias))
    for got, wanted in zip(gradients, torch.autograd.grad(expected.sum(), exact), strict=True):
        assert (got.double() - wanted).abs().max() <= torch.finfo(dtype).eps * wanted.abs().max()


HEADS: dict[str, Callable[..., Tensor]] = {
    "log_prob": lambda *head: ws.linear_bernoulli_log_prob(*head).sum(),
    "recomputed": lambda *head: ws.linear_bernoulli_log_prob(*head, recompute=True).sum(),
    "sum": ws.linear_bernoulli_log_prob_sum,
}
HEAD = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


@HEAD
def test_gradients_go_where_they_are_asked_for(head: Callable[..., Tensor], device: str) -> None:
    tensors = _head((2, 3), 4, 5, device=device)
    everything = torch.autograd.grad(head(*tensors), tensors[:3])
    for index in range(3):
        alone = [tensor.detach().requires_grad_(i == index) for i, tensor in enumerate(tensors[:3])]
        (gradient,) = torch.autograd.grad(head(*alone, tensors[3]), alone[index])
        torch.testing.assert_close(gradient, everything[index])
    x = tensors[3].double().requires_grad_()
    (gradient,) = torch.autograd.grad(head(*(tensor.detach() for tensor in tensors[:3]), x), x)
    torch.testing.assert_close(gradient, F.linear(*tensors[:3]).sum(0).detach())


@HEAD
def test_a_backward_pass_can_be_repeated(head: Callable[..., Tensor], device: str) -> None:
    h, weight, bias, x = _head((2, 3), 4, 5, device=device)
    total = head(h, weight, bias, x)
    first = torch.autograd.grad(2 * total, (h, weight, bias), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(2 * total, (h, weight, bias)), strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total.backward()


@HEAD
def test_a_head_without_bias(head: Callable[..., Tensor], device: str) -> None:
    h, weight, bias, x = _head((2, 3), 4, 5, device=device)
    torch.testing.assert_close(head(h, weight, None, x), head(h, weight, torch.zeros_like(bias), x))
    drawn = ws.linear_bernoulli_sample(h, weight, None, key=make_key(device))
    assert torch.equal(drawn, ws.linear_bernoulli_sample(h, weight, torch.zeros_like(bias), key=make_key(device)))
    h, weight, bias, _ = _head((2, 3), 4, 6, device=device)
    drawn = ws.linear_gaussian_rsample(h, weight, None, key=make_key(device))
    assert torch.equal(drawn, ws.linear_gaussian_rsample(h, weight, torch.zeros_like(bias), key=make_key(device)))


@HEAD
def test_autocast(head: Callable[..., Tensor], device: str) -> None:
    """The GEMM runs in the lower precision, and the logits are scored in float32."""
    h, weight, bias, x = _head((2, 3), 40, 5, torch.float32, device)
    lower = [tensor.detach().bfloat16().requires_grad_() for tensor in (h, weight, bias)]
    with torch.autocast(device, torch.bfloat16):
        found = head(h, weight, bias, x)
        drawn = ws.linear_bernoulli_sample(h, weight, bias, key=make_key(device))
        gradients = torch.autograd.grad(found, (h, weight, bias))
    expected = head(*lower, x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, lower), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(drawn, ws.linear_bernoulli_sample(*lower, key=make_key(device)))


@torch.no_grad()
def test_autocast_of_a_gaussian_head(device: str) -> None:
    head = _head((2, 3), 40, 6, torch.float32, device)[:3]
    with torch.autocast(device, torch.bfloat16):
        drawn = ws.linear_gaussian_rsample(*head, key=make_key(device))
    expected = ws.linear_gaussian_rsample(*(tensor.bfloat16() for tensor in head), key=make_key(device))
    assert torch.equal(drawn, expected)


def test_gradients_of_each_row_by_vmap(device: str) -> None:
    h, weight, bias, x = (tensor.detach() for tensor in _head((4,), 3, 5, device=device))

    def loss(module: object) -> Callable[..., Tensor]:
        return lambda weight, bias, h, x: module.linear_bernoulli_log_prob(h, weight, bias, x).sin()

    of_each = {"in_dims": (None, None, 0, 0)}
    found = torch.vmap(torch.func.grad(loss(ws), (0, 1)), **of_each)(weight, bias, h, x)
    wanted = torch.vmap(torch.func.grad(loss(reference), (0, 1)), **of_each)(weight, bias, h, x)
    torch.testing.assert_close(found, wanted)
    many = torch.vmap(ws.linear_bernoulli_log_prob, in_dims=(1, None, None, 0))(h.repeat(2, 1, 1), weight, bias, x)
    torch.testing.assert_close(
        many, ws.linear_bernoulli_log_prob(h.unsqueeze(1).repeat(1, 2, 1), weight, bias, x[:, None])
    )


@pytest.mark.parametrize("op", ["log_prob", "sum"])
def test_peak_memory(op: str) -> None:
    """Peak memory is at most a quarter of eager's, at the size of a step with 50 samples."""
    h, weight, bias, x = _head((50, 100), 200, 784, torch.float32)
    sample_weight = torch.rand(50, 100)

    def eager() -> Tensor:
        logits = F.linear(h, weight, bias)
        losses = F.binary_cross_entropy_with_logits(logits, x.float().expand_as(logits), reduction="none")
        return -(sample_weight * losses.sum(-1)).sum()

    def ours() -> Tensor:
        if op == "sum":
            return ws.linear_bernoulli_log_prob_sum(h, weight, bias, x, sample_weight)
        return (sample_weight * ws.linear_bernoulli_log_prob(h, weight, bias, x)).sum()

    def peak(function: Callable[[], Tensor]) -> int:
        return peak_bytes(lambda: torch.autograd.grad(function(), (h, weight, bias)), torch.device("cpu"))

    assert 4 * peak(ours) <= peak(eager)


def test_memory_does_not_grow_with_the_logits(small_chunks: None) -> None:
    """Besides the gradients of the arguments, a pass allocates one chunk, for any number of rows."""

    def beyond_gradients(rows: int) -> int:
        h, weight, bias, x = _head((rows, 10), 2, 1024, torch.float32)
        call = ws.linear_bernoulli_log_prob_sum(h, weight, bias, x)
        gradients = sum(tensor.nbytes for tensor in (h, weight, bias))
        peaks = [
            peak_bytes(lambda head=head: torch.autograd.grad(head(h, weight, bias, x), (h, weight, bias)), h.device)
            for head in (HEADS["recomputed"], HEADS["sum"])
        ]
        drawn = peak_bytes(lambda: ws.linear_bernoulli_sample(h, weight, bias, dtype=torch.bool), h.device)
        assert call.isfinite()
        return max(*(peak - gradients for peak in peaks), drawn - rows * 10 * 1024)

    assert beyond_gradients(400) <= beyond_gradients(100) + 4000 * 4 * 8  # a few numbers for each row


def test_the_choice_of_what_is_kept() -> None:
    """recompute=False keeps the logits for the backward pass, True keeps nothing, and None keeps small logits."""
    for rows, kept in ((100, True), (10_000, False)):
        h, weight, bias, x = _head((1, rows), 4, 500, torch.float32)
        saved = {}
        for recompute in (None, True, False):
            sizes: list[int] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes: to.append(t.numel()) or t, lambda t: t):
                ws.linear_bernoulli_log_prob(h, weight, bias, x, recompute=recompute)
            saved[recompute] = rows * 500 in sizes[4:]  # after h, weight, bias and x
        assert saved == {None: kept, True: False, False: True}
