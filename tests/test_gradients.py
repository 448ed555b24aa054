"""Check first and second derivatives of every op by finite differences, and run torch.library.opcheck."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import SMALL, Case, as_tuple, make_key, thorough

import wakesleep_ext as ws

HALF_TYPES = (torch.bfloat16, torch.float16)
DIFFERENTIABLE = [case for case in SMALL if not case.is_binary]

# gradients of broadcast arguments are sums over rows
BROADCAST = [
    Case("gaussian_rsample_log_prob", ((2, 1, 3), (4, 3)), (2,)),
    Case("gaussian_log_prob", ((4, 3), (3,), (2, 4, 3))),
    Case("gaussian_log_prob", ((2, 4, 3), (4, 3), (3,))),
    Case("gaussian_log_prob_sum", ((4, 3), (3,), (2, 4, 3), (2, 1))),
    Case("gaussian_log_prob_sum", ((2, 4, 3), (4, 3), (3,), ())),
    Case("gaussian_kl", ((3,), (4, 3))),
    Case("gaussian_kl_between", ((4, 3), (3,), (2, 1, 3), (3,))),
    Case("gaussian_kl_between", ((3,), (3,), (4, 3), (2, 4, 3))),
    Case("bernoulli_log_prob", ((2, 3), (4, 1, 3))),
    Case("linear_bernoulli_log_prob", ((2, 1, 3), (5, 3), (5,), (4, 5))),
    Case("linear_bernoulli_log_prob", ((3,), (5, 3), (5,), (2, 4, 5))),
    Case("linear_bernoulli_log_prob_sum", ((2, 1, 3), (5, 3), (5,), (4, 5), (2, 1))),
]


@pytest.mark.parametrize("case", DIFFERENTIABLE + BROADCAST, ids=str)
def test_gradcheck(case: Case, device: str) -> None:
    inputs = case.inputs(torch.float64, device, requires_grad=True)
    assert torch.autograd.gradcheck(case.function(), inputs)


@pytest.mark.parametrize("case", DIFFERENTIABLE + BROADCAST, ids=str)
def test_gradgradcheck(case: Case, device: str) -> None:
    inputs = case.inputs(torch.float64, device, requires_grad=True)
    assert torch.autograd.gradgradcheck(case.function(), inputs)


def _arguments(case: Case, dtype: torch.dtype, device: str, requires_grad: bool) -> tuple[Any, tuple[Any, ...]]:
    """Return the operator behind an op, and its arguments."""
    inputs = case.inputs(dtype, device, requires_grad)
    if case.op in ("linear", "mlp"):
        h, *layers = inputs
        names = (None, case.activation) if case.op == "linear" else (case.activation, "sigmoid")
        return torch.ops.wakesleep_ext.mlp.default, (h, layers[::2], layers[1::2], *names)
    operator = getattr(torch.ops.wakesleep_ext, case.op).default
    if case.draws:
        sample_shape = () if case.op == "linear_bernoulli_sample" else (list(case.sample_shape),)
        return operator, (*inputs, make_key(device), *sample_shape)
    return operator, inputs if case.recompute is None else (*inputs, case.recompute)


@pytest.mark.parametrize("requires_grad", [True, thorough(False)])
@pytest.mark.parametrize("dtype", [thorough(torch.float64), torch.float32, *map(thorough, HALF_TYPES)], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_opcheck(case: Case, dtype: torch.dtype, requires_grad: bool, device: str) -> None:
    operator, arguments = _arguments(case, dtype, device, requires_grad)
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("case", BROADCAST, ids=str)
def test_opcheck_broadcast(case: Case, device: str) -> None:
    operator, arguments = _arguments(case, torch.float32, device, True)
    torch.library.opcheck(operator, arguments)


def test_opcheck_backward_operators(device: str) -> None:
    mu, logvar = torch.randn(2, 3, 5, device=device)
    z, grad = torch.randn(2, 3, 5, device=device), torch.randn(2, 3, device=device)
    head = z, z[0], grad[0], torch.rand(3, 3, device=device)  # h, weight, bias, x
    hidden = torch.rand(6, 3, device=device)
    o = torch.ops.wakesleep_ext
    key = make_key(device)
    for operator, arguments in (
        (o.gaussian_rsample_backward, (z, grad, mu, logvar, key, [2])),
        (o.gaussian_rsample_backward, (None, grad, mu, logvar, key, [2])),
        (o.gaussian_log_prob_backward, (grad, mu, logvar, z, True)),
        (o.gaussian_log_prob_backward, (grad, mu, logvar, z, False)),
        (o.standard_gaussian_log_prob_backward, (grad, z)),
        (o.gaussian_kl_backward, (grad[0], mu, logvar)),
        (o.gaussian_kl_between_backward, (grad, z, logvar, mu, logvar[0], True, True)),
        (o.gaussian_kl_between_backward, (grad, z, logvar, mu, logvar[0], True, False)),
        (o.gaussian_kl_between_backward, (grad, z, logvar, mu, logvar[0], False, True)),
        (o.bernoulli_log_prob_backward, (grad, z, z)),
        (o.mlp_with_hidden, (z, [z[0], z[1].mT], [grad[0], mu[0]], "relu", None)),
        (
            o.mlp_backward,
            (z, z, [hidden], z, [z[0], z[1].mT.contiguous()], [grad[0], mu[0]], "relu", None, True, False),
        ),
        (o.linear_bernoulli_log_prob_and_logits, (*head, 0)),
        (o.linear_bernoulli_log_prob_and_logits, (*head, 1000)),
        (o.linear_bernoulli_log_prob_backward, (grad, *head, None, True, True)),
        (o.linear_bernoulli_log_prob_backward, (grad, *head, (z @ z[0].mT).flatten(0, 1), True, False)),
        (o.linear_bernoulli_log_prob_and_gradients, (*head, None, -0.5, False, True, False)),
        (o.linear_bernoulli_log_prob_and_gradients, (*head, grad, 1.0, True, False, True)),
        (o.gaussian_log_prob_and_gradients, (mu, logvar, z, None, -0.5, False, False)),
        (o.gaussian_log_prob_and_gradients, (mu, logvar, z, grad, 1.0, True, True)),
        (o.advance_, ([torch.zeros(3, device=device), torch.zeros((), dtype=torch.int64, device=device)], [1, -2])),
    ):
        torch.library.opcheck(operator.default, arguments)


def test_every_operator_of_the_library_is_checked() -> None:
    """Every operator has CPU, CUDA and Autograd kernels, or is composed of other operators."""
    names = [schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("wakesleep_ext::")]
    assert names
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in names:
        own = [has_kernel(name, key) for key in ("CPU", "CUDA", "Autograd")]
        assert own == 3 * [not has_kernel(name, "CompositeImplicitAutograd")], name


# ops of mu and logvar, as functions of these and of what else they take
PACKED = {
    "rsample": lambda mu, logvar, z: ws.gaussian_rsample(mu, logvar, (3,), key=make_key(mu.device)).sin().sum(-1),
    "rsample_log_prob": lambda mu, logvar, z: ws.gaussian_rsample_log_prob(mu, logvar, (70,), key=make_key(mu.device)),
    "log_prob": ws.gaussian_log_prob,
    "log_prob of many": lambda mu, logvar, z: ws.gaussian_log_prob(mu, logvar, z.repeat(70, 1, 1)),
    "kl": lambda mu, logvar, z: ws.gaussian_kl(mu, logvar),
    "kl to a prior": lambda mu, logvar, z: ws.gaussian_kl_between(mu, logvar, z, z.sin()),
    "kl to many priors": lambda mu, logvar, z: ws.gaussian_kl_between(z.repeat(70, 1, 1), z.sin(), mu, logvar),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", PACKED)
def test_packed_parameters_get_a_packed_gradient(op: str, dtype: torch.dtype, device: str) -> None:
    """The gradient equals chunk's, and no kernel concatenates its halves."""
    z = torch.randn(4, 5, device=device, dtype=dtype)
    ours = torch.randn(4, 10, device=device, dtype=dtype, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    expected = as_tuple(PACKED[op](*theirs.chunk(2, -1), z))
    results = as_tuple(PACKED[op](*ws.gaussian_parameters(ours), z))
    upstream = [torch.randn_like(result) for result in results]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = torch.autograd.grad(results, ours, upstream)
    assert torch.equal(*found, *torch.autograd.grad(expected, theirs, upstream))
    assert not {"aten::cat", "aten::zeros", "aten::clone"} & {event.key for event in profile.key_averages()}


def test_packed_parameters_are_views(device: str) -> None:
    packed = torch.randn(4, 10, device=device)
    for half, expected in zip(ws.gaussian_parameters(packed), packed.chunk(2, -1), strict=True):
        assert torch.equal(half, expected)
        assert half.data_ptr() == expected.data_ptr()


def _in_any_way(packed: torch.Tensor) -> torch.Tensor:
    """Combine ops so that gradients come from one op, from several, from one half, and from swapped halves."""
    mu, logvar = ws.gaussian_parameters(packed)
    z = ws.gaussian_rsample(mu, logvar, key=make_key(packed.device))
    swapped = ws.gaussian_parameters(packed.square())[::-1]
    alone = ws.gaussian_parameters(packed.sin())
    packed_alone = ws.gaussian_parameters(packed.cos())
    return (
        ws.gaussian_kl(mu, logvar)
        + ws.gaussian_log_prob(mu, logvar, z)
        + ws.gaussian_kl(*swapped)
        + alone[0].sum(-1)
        + ws.gaussian_kl(*packed_alone)
    )


def test_packed_parameters_used_in_any_way(device: str) -> None:
    packed = torch.randn(3, 6, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_in_any_way, packed)
    assert torch.autograd.gradgradcheck(_in_any_way, packed)
    expected = torch.autograd.grad(_in_any_way(packed).sum(), packed)
    torch.compiler.reset()
    compiled = torch.compile(_in_any_way, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(packed).sum(), packed), expected)
    found = torch.func.grad(lambda tensor: _in_any_way(tensor).sum())(packed.detach())
    torch.testing.assert_close(found, expected[0])
    torch.library.opcheck(torch.ops.wakesleep_ext.gaussian_parameters.default, (packed,))


def test_compiled_draws_differ(device: str) -> None:
    """Two draws in a compiled function are not merged, and every call draws new values."""
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def two(mu: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ws.gaussian_rsample(mu, mu), ws.gaussian_rsample(mu, mu)

    mu = torch.zeros(100, device=device)
    first, second = two(mu)
    third, _ = two(mu)
    assert not torch.equal(first, second)
    assert not torch.equal(first, third)
