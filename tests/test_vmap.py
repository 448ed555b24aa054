"""vmap and per-example gradients: the members of a batch get the values of separate calls, from a single call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import SMALL, Case, as_tuple, make_key
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import wakesleep_ext as ws

N = 3  # members of a batch

each_case = pytest.mark.parametrize("case", SMALL, ids=str)


def members_of(case: Case, device: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Return the inputs of N members, which differ."""
    return tuple(torch.stack([tensor * (1 + i / 4) for i in range(N)]) for tensor in case.inputs(dtype, device))


def scalar_of(case: Case, **key: Tensor) -> Callable[..., Tensor]:
    function = case.function(**key)
    return lambda *tensors: sum(part.double().sin().sum() for part in as_tuple(function(*tensors)))


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@each_case
def test_members_get_the_values_of_separate_calls(case: Case, device: str) -> None:
    """Also if one of the inputs is shared by all members."""
    inputs = members_of(case, device)
    function = case.function()
    for shared in (None, *range(len(inputs))):
        given = [tensor[0] if index == shared else tensor for index, tensor in enumerate(inputs)]
        in_dims = tuple(None if index == shared else 0 for index in range(len(inputs)))
        if set(in_dims) == {None}:
            continue
        found = as_tuple(torch.vmap(function, in_dims)(*given))
        separate = [
            as_tuple(function(*(t if index == shared else t[i] for index, t in enumerate(given)))) for i in range(N)
        ]
        close(found, tuple(map(torch.stack, zip(*separate, strict=True))))


def test_every_operator_has_a_rule() -> None:
    """torch would otherwise call an operator for each member, or refuse views."""
    names = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("wakesleep_ext::")}
    keys = "FuncTorchBatched", "FuncTorchBatchedDecomposition"
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    without = {name.removeprefix("wakesleep_ext::") for name in names if not any(has(name, key) for key in keys)}
    in_place = {"adam_", "advance_"}
    only_without_transforms = {"gaussian_log_prob_and_gradients", "linear_bernoulli_log_prob_and_gradients"}
    assert without == in_place | only_without_transforms


def test_halves_of_members() -> None:
    packed = torch.randn(N, 5, 6)
    found = torch.vmap(ws.gaussian_parameters)(packed)
    assert all(torch.equal(half, other) for half, other in zip(found, packed.chunk(2, -1), strict=True))


@each_case
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
def test_members_get_the_gradients_of_separate_calls(case: Case, transform: Callable[..., Any], device: str) -> None:
    if case.is_binary:
        pytest.skip("draws of zeros and ones have no gradient")
    inputs = members_of(case, device)
    for which in (tuple(range(len(inputs))), (0,), (len(inputs) - 1,)):
        derivative = transform(scalar_of(case), which)
        expected = []
        for i in range(N):
            member = [tensor[i].clone().requires_grad_(index in which) for index, tensor in enumerate(inputs)]
            wanted = [member[index] for index in which]
            expected.append(torch.autograd.grad(scalar_of(case)(*member), wanted, materialize_grads=True))
        close(torch.vmap(derivative)(*inputs), tuple(map(torch.stack, zip(*expected, strict=True))))


@each_case
def test_gradients_of_several_results_at_once(case: Case, device: str) -> None:
    """vmap of a backward pass calls the backward operators under vmap."""
    if case.is_binary:
        pytest.skip("draws of zeros and ones have no gradient")
    inputs = case.inputs(torch.float64, device, requires_grad=True)
    outputs = [output for output in case(*inputs) if output.requires_grad]
    upstream = [torch.stack([(i + 1) * output.detach().cos() for i in range(N)]) for output in outputs]

    def gradients(*upstream: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, inputs, upstream, retain_graph=True, materialize_grads=True)

    separate = [gradients(*(tensor[i] for tensor in upstream)) for i in range(N)]
    close(torch.vmap(gradients)(*upstream), tuple(map(torch.stack, zip(*separate, strict=True))))


class Calls(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@each_case
def test_one_call_for_all_members(case: Case) -> None:
    def count(members: int) -> int:
        inputs = tuple(torch.stack(members * [tensor]) for tensor in case.inputs(torch.float32))
        with Calls() as calls:
            torch.vmap(case.function() if case.is_binary else torch.func.grad(scalar_of(case)))(*inputs)
        return calls.count

    assert count(2) == count(7)


SAMPLERS = {
    "gaussian_rsample": lambda mu, logvar: ws.gaussian_rsample(mu, logvar, (2,)),
    "gaussian_rsample_log_prob": lambda mu, logvar: ws.gaussian_rsample_log_prob(mu, logvar, (2,))[1],
    "bernoulli_sample": lambda mu, logvar: ws.bernoulli_sample(mu + logvar, (2,)),
    "linear_bernoulli_sample": lambda mu, logvar: ws.linear_bernoulli_sample(mu, torch.eye(5).to(mu), logvar),
    "linear_gaussian_rsample": lambda mu, logvar: ws.linear_gaussian_rsample(
        mu, torch.eye(5).repeat(2, 1).to(mu), logvar.repeat(2), (2,)
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_randomness_of_members(name: str, device: str) -> None:
    """'different' draws what successive calls draw, 'same' what calls with a single key draw."""
    sample = SAMPLERS[name]
    generator = torch.Generator().manual_seed(3)
    mu, logvar = torch.randn(2, N, 5, generator=generator).to(device)
    torch.manual_seed(1)
    found = torch.vmap(sample, randomness="different")(mu, logvar)
    torch.manual_seed(1)
    torch.testing.assert_close(found, torch.stack(list(map(sample, mu, logvar))))
    same = torch.vmap(sample, randomness="same")(mu[:1].expand(N, -1), logvar[:1].expand(N, -1))
    assert torch.equal(same[0], same[1])
    with pytest.raises(RuntimeError, match="vmap: an op drew a key, but the randomness mode is 'error'"):
        torch.vmap(sample)(mu, logvar)


def test_gradients_of_draws_with_keys_of_their_own(device: str) -> None:
    """The transforms may be nested in either order."""
    generator = torch.Generator().manual_seed(3)
    mu, logvar = torch.randn(2, N, 5, generator=generator, dtype=torch.float64).to(device)
    keys = torch.stack([make_key(device) + i for i in range(N)])

    def loss(mu: Tensor, logvar: Tensor, key: Tensor) -> Tensor:
        z, log_prob = ws.gaussian_rsample_log_prob(mu, logvar, (70,), key=key)
        return z.sin().sum() + log_prob.square().mean()

    def total(mu: Tensor, logvar: Tensor) -> Tensor:
        return torch.vmap(loss)(mu, logvar, keys).sum()

    leaves = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
    expected = torch.autograd.grad(sum(map(loss, *leaves, keys)), leaves)
    close(torch.vmap(torch.func.grad(loss, (0, 1)))(mu, logvar, keys), expected)
    close(torch.func.grad(total, (0, 1))(mu, logvar), expected)
    close(torch.autograd.grad(total(*leaves), leaves), expected)
    assert torch.autograd.gradgradcheck(total, leaves)


def test_several_keys_must_match_the_parameters() -> None:
    mu = torch.zeros(2, 3, 5)
    for key in (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(2, 3, 5, 2, dtype=torch.int64)):
        for device in ("cpu", "meta"):
            with pytest.raises(ValueError, match=r"gaussian_rsample: expected key to have shape \[2\]"):
                ws.gaussian_rsample(mu.to(device), mu.to(device), key=key.to(device))
