"""Run every op in every mode of torch: the result equals the reference, or the op refuses."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import SHAPES, SMALL, TESTED_ELSEWHERE, Case, as_tuple, make_key, thorough
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import wakesleep_ext as ws
from wakesleep_ext import reference
from wakesleep_ext._op_table import OPS

Tensors = tuple[Tensor, ...]
Way = Callable[[Case, str], None]

close = torch.testing.assert_close


def scalar(results: Any) -> Tensor:
    """Return a scalar whose gradient differs between elements."""
    return sum(result.sin().sum() for result in as_tuple(results))  # type: ignore[return-value]


def gradients(results: Any, inputs: Tensors) -> Tensors:
    return torch.autograd.grad(scalar(results), inputs)


def wanted(case: Case, inputs: Tensors) -> tuple[Any, Tensors]:
    """Return values and gradients of the reference."""
    results = case.function(reference)(*inputs)
    return results, () if case.is_binary else gradients(results, inputs)


def check(case: Case, run: Callable[..., Any], inputs: Tensors) -> None:
    """Check values and gradients against the reference."""
    results, expected = wanted(case, inputs)
    found = run(*inputs)
    close(found, results)
    if case.is_binary:
        assert not found.requires_grad
    else:
        close(gradients(found, inputs), expected)


def eager(case: Case, device: str) -> None:
    check(case, case.function(), case.inputs(torch.float64, device, requires_grad=True))


def compiled(dynamic: bool) -> Way:
    def way(case: Case, device: str) -> None:
        torch.compiler.reset()
        run = torch.compile(case.function(), fullgraph=True, dynamic=dynamic, backend="aot_eager")
        check(case, run, case.inputs(torch.float64, device, requires_grad=True))

    return way


def exported(case: Case, device: str) -> None:
    class Model(nn.Module):
        def forward(self, key: Tensor, *inputs: Tensor) -> Any:
            return case.function(key=key)(*inputs)

    inputs = case.inputs(torch.float64, device)
    program = torch.export.export(Model(), (make_key(device), *inputs))
    close(program.module()(make_key(device), *inputs), case.function(reference)(*inputs))


def vmapped(case: Case, device: str) -> None:
    batch = tuple(torch.stack([tensor, 2 * tensor]) for tensor in case.inputs(torch.float64, device))
    close(torch.vmap(case.function())(*batch), torch.vmap(case.function(reference))(*batch))


def functional_grad(case: Case, device: str) -> None:
    inputs = case.inputs(torch.float64, device)
    which = tuple(range(len(inputs)))
    batch = tuple(torch.stack([tensor, 2 * tensor]) for tensor in inputs)

    def ours(*tensors: Tensor) -> Tensor:
        return scalar(case.function()(*tensors))

    def theirs(*tensors: Tensor) -> Tensor:
        return scalar(case.function(reference)(*tensors))

    if case.is_binary:
        found = torch.func.grad(ours, which)(*inputs)
        assert not any(gradient.any() for gradient in found)
        return
    close(torch.func.grad(ours, which)(*inputs), torch.func.grad(theirs, which)(*inputs))
    close(torch.vmap(torch.func.grad(ours, which))(*batch), torch.vmap(torch.func.grad(theirs, which))(*batch))


def jacobian(case: Case, device: str) -> None:
    inputs = case.inputs(torch.float64, device)
    which = tuple(range(len(inputs)))
    found = torch.func.jacrev(case.function(), which)(*inputs)
    if case.is_binary:
        assert not any(part.any() for part in found)
    else:
        close(found, torch.func.jacrev(case.function(reference), which)(*inputs))


def twice(case: Case, device: str) -> None:
    """Return the gradient of a gradient."""
    inputs = case.inputs(torch.float64, device, requires_grad=True)
    if case.is_binary:
        assert not case.function()(*inputs).requires_grad
        return
    found, expected = (
        gradients(torch.autograd.grad(scalar(f(*inputs)), inputs, create_graph=True), inputs)
        for f in (case.function(), case.function(reference))
    )
    close(found, expected)


def checkpointed(case: Case, device: str) -> None:
    """The recomputation draws the same noise as the first pass, with a key and without."""
    inputs = case.inputs(torch.float64, device, requires_grad=True)
    check(case, lambda *tensors: checkpoint(case.function(), *tensors, use_reentrant=False), inputs)
    if not case.draws or case.is_binary:
        return
    torch.manual_seed(5)
    z, *_ = as_tuple(checkpoint(getattr(ws, case.op), *inputs, use_reentrant=False))
    mu, logvar = case.row.moments(*inputs)
    sigma = (logvar / 2).exp()
    noise = ((z - mu) / sigma).detach()
    expected = torch.autograd.grad((mu + sigma * noise).sum(), inputs)
    close(torch.autograd.grad(z.sum(), inputs), expected)


def autocast(case: Case, device: str) -> None:
    """Log-likelihoods stay in float32; only GEMMs run in the lower precision."""
    inputs = case.inputs(torch.float32, device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        found = case(*inputs)
    multiplies = "weight" in case.row.inputs
    lower = [
        tensor.bfloat16() if multiplies and name not in ("x", "sample_weight") else tensor
        for name, tensor in zip(case.row.inputs, inputs, strict=True)
    ]
    with torch.autocast(device, enabled=False):
        expected = case(*lower)
    for got, right in zip(found, expected, strict=True):
        assert got.dtype == right.dtype
        assert "log_prob" not in case.op or got.dtype == torch.float32
        close(got, right)
    if not case.is_binary:
        assert all(gradient.dtype == torch.float32 for gradient in gradients(found, inputs))


def meta(case: Case, device: str) -> None:
    """Return shapes and dtypes, without data."""
    inputs = case.inputs(torch.bfloat16, device)
    on_meta = tuple(tensor.to("meta") for tensor in inputs)
    for found, expected in zip(as_tuple(case.function(key=make_key("meta"))(*on_meta)), case(*inputs), strict=True):
        assert found.is_meta
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


def forward_mode(case: Case, device: str) -> None:
    """Forward mode is refused, not ignored. Draws of zeros and ones have no derivative."""
    inputs = case.inputs(torch.float64, device)
    with torch.autograd.forward_ad.dual_level():
        duals = tuple(torch.autograd.forward_ad.make_dual(tensor, torch.ones_like(tensor)) for tensor in inputs)
        if case.is_binary:
            assert torch.autograd.forward_ad.unpack_dual(case.function()(*duals)).tangent is None
            return
        with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
            case.function()(*duals)


WAYS: dict[str, Way] = {
    "eager": eager,
    "compile static": compiled(dynamic=False),
    "compile dynamic": compiled(dynamic=True),
    "export": exported,
    "vmap": vmapped,
    "grad": functional_grad,
    "jacrev": jacobian,
    "double backward": twice,
    "checkpoint": checkpointed,
    "autocast": autocast,
    "meta": meta,
    "forward mode": forward_mode,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_op_in_every_way(case: Case, way: str, device: str) -> None:
    WAYS[way](case, device)


def test_no_op_is_left_out() -> None:
    """Every public op has a row in the table, or tests in a separate file."""
    assert set(OPS) == set(ws.ops.__all__)
    assert {case.op for case in SMALL} == {case.op for case in SHAPES} == set(OPS) - set(TESTED_ELSEWHERE)
    for op, file in TESTED_ELSEWHERE.items():
        assert f"ws.{op}(" in (Path(__file__).parent / file).read_text()


def test_draws_with_an_explicit_generator_break_a_full_graph() -> None:
    """torch's own draws do so too. A key does not."""
    torch.compiler.reset()
    mu, generator = torch.zeros(3), torch.Generator()
    draw = torch.compile(lambda mu: ws.gaussian_rsample(mu, mu, generator=generator), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        draw(mu)


class Noise(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, item: int) -> Tensor:
        zeros = torch.zeros(3)
        return ws.gaussian_rsample(zeros, zeros)


@pytest.mark.parametrize("context", ["fork", thorough("spawn")])
def test_data_workers_draw_noise_of_their_own(context: str) -> None:
    loader = torch.utils.data.DataLoader(Noise(), batch_size=1, num_workers=2, multiprocessing_context=context)
    rows = torch.cat(list(loader))
    assert len(rows.unique(dim=0)) == len(Noise())


def train_in_parallel(rank: int, store: str) -> Tensor:
    """Train a head whose gradient is averaged over two processes."""
    method, patience = f"file://{store}", timedelta(minutes=2)
    torch.distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=2, timeout=patience)
    torch.manual_seed(0)
    head = ws.modules.BernoulliHead(3, 4)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, h: Tensor, x: Tensor) -> Tensor:
            return -self.head.distribution(h).log_prob(x).mean()

    h, x = torch.randn(2, 5, 3)[rank], torch.randint(2, (2, 5, 4))[rank].float()
    parallel = nn.parallel.DistributedDataParallel(Loss())
    try:
        parallel(h, x).backward()
    finally:
        del parallel  # before its group: a group that it destroys can wait for the GIL for good
        torch.distributed.destroy_process_group()
    assert head.weight.grad is not None
    return head.weight.grad


def train_as_other_rank(store: str, result: str) -> None:
    torch.save(train_in_parallel(1, store), result)


def test_gradients_are_averaged_over_processes(tmp_path: Any) -> None:
    store, result = str(tmp_path / "store"), str(tmp_path / "gradient")
    spawn = torch.multiprocessing.get_context("spawn")
    other = spawn.Process(target=train_as_other_rank, args=(store, result), daemon=True)
    other.start()
    first = train_in_parallel(0, store)
    other.join(timeout=60)
    assert other.exitcode == 0
    assert torch.equal(first, torch.load(result))
    torch.manual_seed(0)
    head = ws.modules.BernoulliHead(3, 4)
    h, x = torch.randn(2, 5, 3).flatten(0, 1), torch.randint(2, (2, 5, 4)).flatten(0, 1).float()
    (-head.distribution(h).log_prob(x).mean()).backward()
    close(first, head.weight.grad)
