"""Compare a step of Adam with the formula and torch's optimizer, and check that it changes nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import wakesleep_ext as ws
from wakesleep_ext import reference
from wakesleep_ext.replay import Replay

BETAS, EPS = (0.8, 0.95), 1e-3
SIZES = ((1,), (7,), (785,), (0,), (), (3, 0, 2), (33, 65), (4096,), (5, 1, 9))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def make(sizes: Any, device: str, dtype: torch.dtype = torch.float32) -> Lists:
    """Return parameters, gradients and running means as in the middle of a run."""
    parameters, gradients, exp_avgs, squares = (
        [torch.randn(size, dtype=torch.float64).to(device, dtype) for size in sizes] for _ in range(4)
    )
    return parameters, gradients, exp_avgs, [square.square() for square in squares]


def numbers(device: str, step: float = 3, lr: float = 0.01) -> tuple[Tensor, Tensor]:
    return torch.tensor(float(step), device=device), torch.tensor(lr, device=device, dtype=torch.float64)


def copied(lists: Lists, dtype: torch.dtype | None = None) -> Any:
    return tuple([tensor.to(dtype or tensor.dtype, copy=True) for tensor in tensors] for tensors in lists)


def changed(lists: Lists) -> list[Tensor]:
    parameters, _, exp_avgs, exp_avg_sqs = lists
    return [*parameters, *exp_avgs, *exp_avg_sqs]


def assert_same(lists: Lists, others: Lists) -> None:
    for tensors, expected in zip(lists, others, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(tensors, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", [1, 2, 1000])
def test_a_step_is_that_of_the_formula(step: int, dtype: torch.dtype, device: str) -> None:
    found = make(SIZES, device, dtype)
    exact = copied(found, torch.float64)
    ws.adam_(*found, *numbers(device, step), *BETAS, EPS)
    reference.adam_(*exact, *numbers(device, step), *BETAS, EPS)
    tolerance = 8 * torch.finfo(dtype).eps
    for one, other in zip(changed(found), changed(exact), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(one.double(), other) for one, other in zip(found[1], exact[1], strict=True))


@pytest.mark.parametrize("number", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_run_is_that_of_torch(dtype: torch.dtype, number: torch.dtype, device: str) -> None:
    parameters, gradients, *_ = make(SIZES, device, dtype)
    exp_avgs, exp_avg_sqs = ([torch.zeros_like(parameter) for parameter in parameters] for _ in range(2))
    others = [parameter.clone().requires_grad_() for parameter in parameters]
    optimizer = torch.optim.Adam(others, 0.01, BETAS, EPS)
    step, lr = torch.zeros((), device=device, dtype=number), torch.tensor(0.01, device=device, dtype=number)
    for _ in range(200):
        step += 1
        gradients = [(parameter - 1).sin() for parameter in parameters]
        ws.adam_(parameters, gradients, exp_avgs, exp_avg_sqs, step, lr, *BETAS, EPS)
        for other in others:
            other.grad = (other.detach() - 1).sin()
        optimizer.step()
    tolerance = 1e-12 if (dtype, number) == (torch.float64, torch.float64) else 1e-5
    for parameter, m, v, other in zip(parameters, exp_avgs, exp_avg_sqs, others, strict=True):
        state = optimizer.state[other]
        for one, expected in ((parameter, other.detach()), (m, state["exp_avg"]), (v, state["exp_avg_sq"])):
            torch.testing.assert_close(one, expected, rtol=tolerance, atol=tolerance)


def test_any_number_of_tensors(device: str) -> None:
    """There are more tensors than fit in one launch."""
    for count in (0, 1, 82, 83, 200):
        sizes = [(number % 5 * 3,) for number in range(count)]
        found = make(sizes, device)
        one_by_one = copied(found)
        ws.adam_(*found, *numbers(device), *BETAS, EPS)
        for number in range(count):
            ws.adam_(*([tensors[number]] for tensors in one_by_one), *numbers(device), *BETAS, EPS)
        assert_same(found, one_by_one)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wherever_tensors_lie_and_nothing_beside_them(dtype: torch.dtype, device: str) -> None:
    """Tensors start at various offsets, some of them unaligned, and the memory around them is unchanged."""
    sizes = (1, 7, 64, 785, 2500)
    plain = make([(size,) for size in sizes], device, dtype)
    placed, around = [], []
    for place, tensors in enumerate(plain):
        of_list = []
        for number, tensor in enumerate(tensors):
            first = (place + number) % 9
            memory = torch.full((first + len(tensor) + 40,), 7, dtype=dtype, device=device)
            inside = memory[first : first + len(tensor)]
            of_list.append(inside.copy_(tensor))
            around += [memory[:first], memory[first + len(tensor) :]]
        placed.append(of_list)
    ws.adam_(*placed, *numbers(device), *BETAS, EPS)
    ws.adam_(*plain, *numbers(device), *BETAS, EPS)
    assert_same(tuple(placed), plain)
    assert all((outside == 7).all() for outside in around)


def test_gradients_may_lie_in_any_order(device: str) -> None:
    found = make([(5, 7), (3,)], device)
    same = copied(found)
    strided = [found[1][0].T.contiguous().T, found[1][1].repeat_interleave(2)[::2]]
    assert not any(gradient.is_contiguous() for gradient in strided)
    ws.adam_(found[0], strided, *found[2:], *numbers(device), *BETAS, EPS)
    ws.adam_(*same, *numbers(device), *BETAS, EPS)
    assert_same(found, same)


def test_parameters_may_lie_in_any_order_without_gaps(device: str) -> None:
    found = make([(5, 7), (64, 33)], device)
    parameters, gradients, *states = copied(found)
    turned = [[tensor.T.contiguous().T for tensor in tensors] for tensors in (parameters, *states)]
    assert not any(tensor.is_contiguous() for tensor in turned[0])
    ws.adam_(turned[0], gradients, *turned[1:], *numbers(device), *BETAS, EPS)
    ws.adam_(*found, *numbers(device), *BETAS, EPS)
    assert_same((turned[0], gradients, *turned[1:]), found)


def test_the_same_bits_on_any_number_of_threads() -> None:
    lists, threads = make([(200, 784), (200,), (3,), (50, 400)], "cpu"), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(copied(lists))
            ws.adam_(*results[-1], *numbers("cpu"))
    finally:
        torch.set_num_threads(threads)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_a_graph_that_has_kept_old_values_notices(device: str) -> None:
    lists = make([(3,), (4, 2)], device)
    weight, gradient = lists[0][0].requires_grad_(), lists[1][0]
    loss = weight.square().sum()
    with pytest.raises(RuntimeError, match=r"under torch.no_grad\(\), since parameters\[0\] requires a gradient"):
        ws.adam_(*lists, *numbers(device))
    loss.backward()
    loss = weight.square().sum()
    before = [tensor._version for tensor in changed(lists)]
    with torch.no_grad():
        ws.adam_(*lists, *numbers(device))
    assert [tensor._version for tensor in changed(lists)] == [version + 1 for version in before]
    assert gradient._version == 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_adam_as_an_operator(device: str) -> None:
    lists = make([(3,), (), (4, 2)], device)
    torch.library.opcheck(torch.ops.wakesleep_ext.adam_.default, (*lists, *numbers(device), *BETAS, EPS))
    on_meta = [[tensor.to("meta") for tensor in tensors] for tensors in lists]
    assert ws.adam_(*on_meta, *numbers("meta")) is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_adam_compiles_whole(device: str) -> None:
    torch.compiler.reset()
    lists = make([(3,), (4, 2)], device)
    same = copied(lists)

    def step(lists: Lists, step: Tensor, lr: Tensor) -> Tensor:
        step.add_(1)
        ws.adam_(*lists, step, lr, *BETAS, EPS)
        return lists[0][0] * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (t, lr), (u, _) = numbers(device), numbers(device)
    for _ in range(3):
        assert torch.equal(compiled(lists, t, lr), step(same, u, lr))
    assert_same(lists, same)
    assert t == u == 6


def test_adam_in_a_replay() -> None:
    lists = make([(3,), (4, 2)], "cpu")
    same = copied(lists)

    def descend(lists: Lists, step: Tensor, x: Tensor) -> Tensor:
        step.add_(1)
        ws.adam_(lists[0], [gradient * x for gradient in lists[1]], *lists[2:], step, torch.ones_like(x) * 0.01)
        return x + lists[0][0].sum()

    t, u = torch.zeros(()), torch.zeros(())
    replayed = Replay(lambda x: descend(lists, t, x), lambda: [*changed(lists), t])
    for x in (torch.tensor(1.0), torch.tensor(-2.0), torch.tensor(0.5)):
        assert torch.equal(replayed(x), descend(same, u, x))
    assert replayed.is_replayed
    assert_same(lists, same)


f = torch.zeros


def _with(**others: Any) -> dict[str, Any]:
    names = ("parameters", "gradients", "exp_avgs", "exp_avg_sqs")
    arguments = {name: [torch.ones(3), torch.ones(2, 5)] for name in names}
    return {**arguments, "step": torch.ones(()), "lr": torch.ones(()), **others}


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"gradients": [f(3)]}, ValueError, "expected gradients to have 2 tensors, as many as parameters, got 1"),
    ({"exp_avgs": [f(3)] * 3}, ValueError, "expected exp_avgs to have 2 tensors, as many as parameters, got 3"),
    ({"exp_avg_sqs": []}, ValueError, "expected exp_avg_sqs to have 2 tensors, as many as parameters, got 0"),
    ({"gradients": [f(3), f(5, 2)]}, ValueError,
     r"expected gradients\[1\] to have shape \[2, 5\], that of parameters\[1\], got \[5, 2\]"),
    ({"exp_avgs": [f(3), f(10)]}, ValueError,
     r"expected exp_avgs\[1\] to have shape \[2, 5\], that of parameters\[1\], got \[10\]"),
    ({"exp_avg_sqs": [f(3), f(5, 2).T]}, ValueError,
     r"expected exp_avg_sqs\[1\] to have strides \[5, 1\], those of parameters\[1\], got \[1, 2\]"),
    ({"parameters": [f(6)[::2], f(2, 5)]}, ValueError,
     r"expected parameters\[0\] to be dense, got shape \[3\] and strides \[2\]"),
    ({"parameters": [f(3).long(), f(2, 5)]}, TypeError,
     r"expected parameters\[0\] to be float64, float32, bfloat16 or float16, got Long"),
    ({"parameters": [f(3), f(2, 5).double()]}, TypeError,
     r"expected parameters\[1\] to be Float, the dtype of parameters\[0\], got Double"),
    ({"gradients": [f(3), f(2, 5).half()]}, TypeError,
     r"expected gradients\[1\] to be Float, the dtype of parameters\[1\], got Half"),
    ({"exp_avg_sqs": [f(3).double(), f(2, 5)]}, TypeError,
     r"expected exp_avg_sqs\[0\] to be Float, the dtype of parameters\[0\], got Double"),
    ({"step": f(1)}, ValueError, r"expected step to have shape \[\], got \[1\]"),
    ({"lr": f(2, 1)}, ValueError, r"expected lr to have shape \[\], got \[2, 1\]"),
    ({"step": f(()).long()}, TypeError, "expected step to be float64 or float32, got Long"),
    ({"lr": f(()).half()}, TypeError, "expected lr to be float64 or float32, got Half"),
    ({"beta1": 1.0}, ValueError, r"expected beta1 to be in \[0, 1\), got 1"),
    ({"beta2": -0.1}, ValueError, r"expected beta2 to be in \[0, 1\), got -0.1"),
    ({"beta2": float("nan")}, ValueError, r"expected beta2 to be in \[0, 1\), got nan"),
    ({"eps": -1e-8}, ValueError, "expected eps to be finite and not negative, got -1e-08"),
]  # fmt: skip


@pytest.mark.parametrize(("others", "error", "message"), REFUSED, ids=[message[:60] for _, _, message in REFUSED])
def test_what_adam_refuses_is_left_as_it_was(
    others: dict[str, Any], error: type[Exception], message: str, device: str
) -> None:
    def moved(tensor: Any) -> Any:  # with its gaps
        if not isinstance(tensor, Tensor):
            return tensor
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)

    arguments = torch.utils._pytree.tree_map(moved, _with(**others))
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
    before = [(tensor.clone(), tensor._version) for tensor in tensors]
    with pytest.raises(error, match=f"adam_: {message}"):
        ws.adam_(**arguments)
    for tensor, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version


@pytest.mark.parametrize(
    ("one", "other"), [("parameters", "exp_avgs"), ("exp_avg_sqs", "exp_avgs"), ("gradients", "parameters")]
)
def test_adam_wants_memory_of_its_own_for_what_it_writes(one: str, other: str, device: str) -> None:
    memory = f(12, device=device)
    arguments = torch.utils._pytree.tree_map(lambda tensor: tensor.to(device), _with())
    arguments[one][1], arguments[other][0] = memory[:10].view(2, 5), memory[9:]
    with pytest.raises(ValueError, match=r"adam_: expected \w+\[\d\] to share no memory with \w+\[\d\], but they"):
        ws.adam_(**arguments)
    arguments[other][0] = f(3, device=device)
    arguments["gradients"] = [arguments["gradients"][1][0, :3], arguments["gradients"][1]]  # which are read alone
    ws.adam_(**arguments)


@pytest.mark.parametrize("name", ["lr", "parameters", "gradients", "exp_avgs", "exp_avg_sqs"])
def test_adam_wants_one_device(name: str) -> None:
    elsewhere = torch.utils._pytree.tree_map(lambda tensor: tensor.to("meta"), _with()[name])
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    operator = torch.ops.wakesleep_ext.adam_.default
    where = name if name == "lr" else rf"{name}\[0\]"
    beside = "step" if name in ("lr", "parameters") else r"parameters\[0\]"
    with pytest.raises(ValueError, match=f"adam_: expected {where} on cpu, the device of {beside}, got meta"):
        operator.redispatch(cpu, *_with(**{name: elsewhere}).values(), 0.9, 0.999, 1e-8)
