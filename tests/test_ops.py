"""Compare every op with plain torch in float64: values and first gradients, for all dtypes, shapes and layouts."""

from __future__ import annotations

import pytest
import torch
from cases import SHAPES, SMALL, Case, as_tuple
from torch import Tensor

import wakesleep_ext as ws
from wakesleep_ext import ops, reference
from wakesleep_ext._op_table import FLOATING

# The tolerance of float32 arithmetic for all input dtypes. Half types are computed in float32, and only samples and
# gradients are rounded to their dtype.
ARITHMETIC = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def _close(got: Tensor, expected: Tensor, arithmetic: float, roundings: int = 1) -> None:
    """Check closeness to the precision of the arithmetic, or of a coarser dtype, relative to the largest result."""
    assert got.shape == expected.shape
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    rounding = 0.0 if got.dtype == torch.float64 else torch.finfo(got.dtype).eps
    tolerance = max(4 * arithmetic, roundings * rounding)
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * scale)


def _upstream(results: tuple[Tensor, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r) for r in results]


def _gradients(
    results: tuple[Tensor, ...], inputs: tuple[Tensor, ...], upstream: list[Tensor]
) -> tuple[Tensor | None, ...]:
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    return torch.autograd.grad(results, leaves, upstream, allow_unused=True)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_values_and_gradients(case: Case, dtype: torch.dtype, device: str) -> None:
    inputs = case.inputs(dtype, device, requires_grad=True)
    exact_inputs = tuple(
        i.detach().double().requires_grad_(i.requires_grad) if i.is_floating_point() else i for i in inputs
    )
    results, exact = case(*inputs), case.reference(*exact_inputs)
    roundings = 8 if case.op == "mlp" else 1  # of what passes between layers
    for name, got, expected in zip(case.row.outputs, results, exact, strict=True):
        assert got.dtype == case.row.output_dtype(name, dtype)
        if case.is_binary:
            assert (got.double() != expected).sum() <= 1e-3 * got.numel()  # where a uniform ties with a rounded p
        else:
            _close(got.detach(), expected.detach(), ARITHMETIC[dtype], roundings)
    if case.is_binary:
        assert not results[0].requires_grad
        return
    upstream = _upstream(results)
    found = _gradients(results, inputs, upstream)
    wanted = _gradients(exact, exact_inputs, [tensor.double() for tensor in upstream])
    for leaf, got, expected in zip((i for i in inputs if i.requires_grad), found, wanted, strict=True):
        assert got is not None
        assert got.dtype == leaf.dtype
        expected = torch.zeros_like(got, dtype=torch.float64) if expected is None else expected
        _close(got, expected, ARITHMETIC[dtype], roundings)


# the products of a head are rounded as the platform's BLAS has it
OF_OUR_ROUNDING = [case for case in SMALL if "weight" not in case.row.inputs]
WITH_ROWS = [case for case in OF_OUR_ROUNDING if not case.op.endswith("_sum")]


@pytest.mark.parametrize("case", WITH_ROWS, ids=str)
def test_a_row_does_not_depend_on_its_batch(case: Case, device: str) -> None:
    """The first rows of a large batch equal the same rows alone, bit for bit. Draws depend on the row's index."""
    wide = case.wide(67, 85)
    inputs = wide.inputs(torch.float32, device)
    together = wide(*inputs)
    alone = wide(*(tensor[:3] for tensor in inputs))
    for all_rows, first_rows in zip(together, alone, strict=True):
        assert torch.equal(all_rows[:3], first_rows)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("width", [21, 1100])
@pytest.mark.parametrize(("batch", "of_z"), [((3,), (65, 3)), ((3, 1), (3, 7)), ((2, 1, 3), (4, 2, 5, 3))], ids=str)
def test_values_that_share_parameters(
    batch: tuple[int, ...], of_z: tuple[int, ...], width: int, dtype: torch.dtype
) -> None:
    """Log-densities and gradients of z have the same bits if each value has its own copy of the parameters."""
    torch.manual_seed(1)
    mu, logvar, z = (torch.randn(*shape, width, dtype=dtype) for shape in (batch, batch, of_z))
    copies = [parameter.expand_as(z).contiguous() for parameter in (mu, logvar)]
    assert torch.equal(ws.gaussian_log_prob(mu, logvar, z), ws.gaussian_log_prob(*copies, z))
    upstream = torch.randn(of_z, dtype=torch.promote_types(dtype, torch.float32))
    backward = torch.ops.wakesleep_ext.gaussian_log_prob_backward.default
    found, expected = (backward(upstream, *parameters, z, True) for parameters in ((mu, logvar), copies))
    assert torch.equal(found[1], expected[1])
    if z.dtype.itemsize >= 4 and batch == (3, 1):  # one piece of rows, added in this order without rounding between
        assert torch.equal(found[0], torch.stack([sum(rows.unbind()) for rows in expected[0]]).unsqueeze(1))


@pytest.mark.parametrize("case", OF_OUR_ROUNDING, ids=str)
def test_threads_do_not_matter(case: Case) -> None:
    wide = case.wide(300, 785)
    inputs = wide.inputs(torch.float32, requires_grad=True)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results = wide(*inputs)
            gradients = () if case.is_binary else _gradients(results, inputs, _upstream(results))
            found.append((*results, *gradients))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_logits(dtype: torch.dtype, device: str) -> None:
    logits = torch.tensor([[-1e4], [-104.0], [-20.0], [20.0], [89.0], [104.0], [1e4]], dtype=dtype, device=device)
    for x in (0.0, 1.0):
        a = logits.clone().requires_grad_()
        value = ws.bernoulli_log_prob(a, torch.full_like(logits, x))
        value.sum().backward()
        exact = logits.double()
        expected = x * exact - torch.nn.functional.softplus(exact)
        # the gradient keeps its relative precision where x - sigmoid(a) would cancel
        gradient = torch.sigmoid(-exact) if x == 1 else -torch.sigmoid(exact)
        torch.testing.assert_close(value.double(), expected[:, 0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(a.grad.double(), gradient, rtol=1e-6, atol=1e-38)


def test_extreme_logvar(device: str) -> None:
    logvar = torch.tensor([[-170.0], [-80.0], [80.0], [170.0]], device=device)
    mu = torch.ones_like(logvar)
    z = mu + 1e-3 * (0.5 * logvar).exp()
    expected = reference.gaussian_log_prob(mu.double(), logvar.double(), z.double())
    torch.testing.assert_close(ws.gaussian_log_prob(mu, logvar, z).double(), expected, rtol=1e-5, atol=1e-5)
    for sign in (-1, 1):  # beyond the range of the exponential
        assert torch.isfinite(ws.gaussian_rsample(mu, torch.full_like(mu, sign * 170.0))).all()


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_equal_gaussians_do_not_diverge(dtype: torch.dtype, device: str) -> None:
    """The divergence and its gradients are exactly 0, for log-variances of any size."""
    mu = torch.randn(5, 37, dtype=dtype, device=device, requires_grad=True)
    logvar = torch.linspace(-170, 170, 37, dtype=dtype, device=device).requires_grad_()
    value = ws.gaussian_kl_between(mu, logvar, mu.detach(), logvar.detach())
    assert not value.any()
    assert not any(grad.any() for grad in torch.autograd.grad(value.sum(), (mu, logvar)))


@pytest.mark.parametrize("logvar", [-170.0, -80.0, 80.0, 170.0])
def test_extreme_logvar_of_both_gaussians(logvar: float, device: str) -> None:
    prior_logvar = torch.tensor([[logvar]], device=device)
    prior_mu = torch.ones_like(prior_logvar)
    mu = prior_mu + 0.5 * (0.5 * prior_logvar).exp()
    arguments = (mu, prior_logvar + 0.5, prior_mu, prior_logvar)
    expected = reference.gaussian_kl_between(*(tensor.double() for tensor in arguments))
    torch.testing.assert_close(ws.gaussian_kl_between(*arguments).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_nan_comes_through(dtype: torch.dtype, device: str) -> None:
    nan = torch.full((2, 3), torch.nan, dtype=dtype, device=device)
    one = torch.ones_like(nan)
    key = ws.random.make_key(1, device=device)
    for value in (
        ws.gaussian_rsample(nan, one, key=key),
        ws.gaussian_rsample(one, nan, key=key),
        ws.gaussian_rsample_log_prob(one, nan, key=key)[1],
        ws.linear_gaussian_rsample(nan, one.repeat(2, 1), None, key=key),
        ws.gaussian_log_prob(one, nan, one),
        ws.gaussian_log_prob(one, one, nan),
        ws.standard_gaussian_log_prob(nan),
        ws.gaussian_kl(nan, one),
        ws.gaussian_kl(one, nan),
        *(ws.gaussian_kl_between(*(nan if i == place else one for i in range(4))) for place in range(4)),
        ws.bernoulli_log_prob(nan, one),
        ws.bernoulli_log_prob(one, nan),
    ):
        assert value.isnan().all()
    assert not ws.bernoulli_sample(nan, key=key).any()


def test_mixed_dtypes_are_promoted(device: str) -> None:
    mu, logvar, z = (t.to(device) for t in torch.randn(3, 4, 6, dtype=torch.float64))
    half = mu.bfloat16().requires_grad_()
    value = ws.gaussian_log_prob(half, logvar.float(), z.float())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, ws.gaussian_log_prob(half.float(), logvar.float(), z.float()))
    value.sum().backward()
    assert half.grad.dtype == torch.bfloat16
    assert ws.gaussian_rsample(mu.float(), logvar).dtype == torch.float64


def test_sample_dtypes(device: str) -> None:
    logits = torch.randn(5, 7, device=device)
    key = ws.random.make_key(3, device=device)
    expected = ws.bernoulli_sample(logits, (2,), key=key)
    assert expected.dtype == torch.float32
    for dtype in (torch.bool, torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float64):
        drawn = ws.bernoulli_sample(logits, (2,), dtype=dtype, key=key)
        assert drawn.dtype == dtype
        assert torch.equal(drawn.float(), expected)


def test_nothing_is_expanded_in_memory() -> None:
    """A likelihood of x [B, D] under logits [L, B, D] allocates only its result."""
    logits, x = torch.randn(50, 20, 784), torch.rand(20, 784)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ws.bernoulli_log_prob(logits, x)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert allocated <= 2 * 50 * 20 * 4


def test_public_names_are_documented() -> None:
    for name in ops.__all__:
        assert getattr(ws, name) is getattr(ops, name)
        assert "Returns:" in getattr(ops, name).__doc__
        assert hasattr(reference, name)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_without_gradients_nothing_is_recorded(case: Case) -> None:
    inputs = case.inputs(torch.float32, requires_grad=True)
    with torch.no_grad():
        assert not any(result.requires_grad for result in case(*inputs))
    assert not any(result.requires_grad for result in case(*(i.detach() for i in inputs)))


def test_gradients_only_where_asked() -> None:
    mu, logvar, z = torch.randn(3, 4, 5).unbind()
    mu.requires_grad_()
    (grad,) = torch.autograd.grad(ws.gaussian_log_prob(mu, logvar, z).sum(), mu)
    torch.testing.assert_close(grad, (z - mu.detach()) * (-logvar).exp())
    for place in range(4):  # of the argument that requires a gradient
        arguments = [*torch.randn(4, 4, 5).unbind()]
        leaf = arguments[place].requires_grad_()
        (grad,) = torch.autograd.grad(ws.gaussian_kl_between(*arguments).sum(), leaf)
        torch.testing.assert_close(grad, *torch.autograd.grad(reference.gaussian_kl_between(*arguments).sum(), leaf))
    z_only, log_prob = ws.gaussian_rsample_log_prob(mu, logvar, (3,))
    (grad,) = torch.autograd.grad(z_only.sum(), mu, retain_graph=True)
    torch.testing.assert_close(grad, torch.full_like(grad, 3))
    (grad,) = torch.autograd.grad(log_prob.sum(), mu)
    assert not grad.any()


def test_results_can_be_used_in_place() -> None:
    """Writing to an op's outputs does not change any gradient."""
    mu = torch.zeros(3, 4, requires_grad=True)
    (z,) = as_tuple(ws.gaussian_rsample(mu, torch.zeros(3, 4)))
    z.mul_(2).sum().backward()
    torch.testing.assert_close(mu.grad, torch.full((3, 4), 2.0))
