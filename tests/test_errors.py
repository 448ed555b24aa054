"""Check the message of every error that bad input can cause."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import wakesleep_ext as ws

f = torch.zeros
KEY = ws.random.make_key(1)

CASES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    # shapes
    (lambda: ws.gaussian_kl(f(()), f(3)), ValueError,
     r"gaussian_kl: expected mu to have at least one dimension, the event, got a 0-dimensional tensor"),
    (lambda: ws.standard_gaussian_log_prob(f(())), ValueError,
     r"standard_gaussian_log_prob: expected z to have at least one dimension"),
    (lambda: ws.bernoulli_sample(f(())), ValueError,
     r"bernoulli_sample: expected logits to have at least one dimension"),
    (lambda: ws.gaussian_kl(f(2, 3), f(2, 4)), ValueError,
     r"gaussian_kl: expected the last dimension of logvar to be 3, that of mu, got 4"),
    (lambda: ws.gaussian_kl_between(f(2, 3), f(2, 3), f(2, 3), f(2, 4)), ValueError,
     r"gaussian_kl_between: expected the last dimension of prior_logvar to be 3, that of prior_mu, got 4"),
    (lambda: ws.gaussian_kl_between(f(2, 3), f(2, 3), f(4), f(4)), ValueError,
     r"gaussian_kl_between: expected the last dimension of prior_mu to be 3, that of mu, got 4"),
    (lambda: ws.gaussian_kl_between(f(2, 3), f(2, 3), f(4, 3), f(3)), ValueError,
     r"gaussian_kl_between: expected the leading dimensions of mu and logvar and prior_mu and prior_logvar to "
     r"broadcast, got \[2\] and \[4\]"),
    (lambda: ws.gaussian_rsample(f(2, 3), f(2, 4)), ValueError,
     r"gaussian_rsample: expected the last dimension of logvar to be 3, that of mu, got 4"),
    (lambda: ws.gaussian_log_prob(f(3), f(3), f(4)), ValueError,
     r"gaussian_log_prob: expected the last dimension of z to be 3, that of mu, got 4"),
    (lambda: ws.bernoulli_log_prob(f(2, 1), f(2, 5)), ValueError,
     r"bernoulli_log_prob: expected the last dimension of x to be 1, that of logits, got 5"),
    (lambda: ws.bernoulli_log_prob(f(2, 3, 5), f(4, 5)), ValueError,
     r"bernoulli_log_prob: expected the leading dimensions of logits and x to broadcast, got \[2, 3\] and \[4\]"),
    (lambda: ws.gaussian_log_prob(f(2, 5), f(2, 5), f(3, 5)), ValueError,
     r"gaussian_log_prob: expected the leading dimensions of mu and logvar and z to broadcast, got \[2\] and \[3\]"),
    (lambda: ws.gaussian_rsample(f(3), f(3), (-1,)), ValueError,
     r"gaussian_rsample: expected sample_shape to have no negative sizes, got \[-1\]"),
    (lambda: ws.gaussian_parameters(f(())), ValueError,
     r"gaussian_parameters: expected packed to have at least one dimension"),
    (lambda: ws.gaussian_parameters(f(2, 5)), ValueError,
     r"gaussian_parameters: expected the last dimension of packed to be even, \[mu \| logvar\], got 5"),
    (lambda: ws.linear_bernoulli_log_prob(f(()), f(5, 3), f(5), f(5)), ValueError,
     r"linear_bernoulli_log_prob: expected h to have at least one dimension"),
    (lambda: ws.linear_bernoulli_log_prob(f(2, 3), f(5), f(5), f(2, 5)), ValueError,
     r"linear_bernoulli_log_prob: expected weight to have shape \[D, H\], got \[5\]"),
    (lambda: ws.linear_bernoulli_log_prob(f(2, 3), f(5, 4), f(5), f(2, 5)), ValueError,
     r"linear_bernoulli_log_prob: expected the last dimension of h to be 4, that of weight, got 3"),
    (lambda: ws.linear_gaussian_rsample(f(2, 3), f(5, 3), f(5)), ValueError,
     r"linear_gaussian_rsample: expected weight to have an even number of rows, \[mu \| logvar\], got 5"),
    (lambda: ws.linear_gaussian_rsample(f(2, 3), f(6, 4), f(6)), ValueError,
     r"linear_gaussian_rsample: expected the last dimension of h to be 4, that of weight, got 3"),
    (lambda: ws.linear_gaussian_rsample(f(2, 3), f(6, 3), f(6), (-1,)), ValueError,
     r"linear_gaussian_rsample: expected sample_shape to have no negative sizes, got \[-1\]"),
    (lambda: ws.linear_gaussian_rsample(f(2, 3), f(6, 3), f(6), key=f(3, dtype=torch.int64)), ValueError,
     r"linear_gaussian_rsample: expected key to have shape \[2\], \(seed, offset\), got \[3\]"),
    (lambda: ws.linear_bernoulli_sample(f(2, 3), f(5, 3), f(4)), ValueError,
     r"linear_bernoulli_sample: expected bias to have shape \[5\], one for each row of weight, got \[4\]"),
    (lambda: ws.linear_bernoulli_log_prob(f(2, 3), f(5, 3), f(5), f(2, 6)), ValueError,
     r"linear_bernoulli_log_prob: expected the last dimension of x to be 5, the rows of weight, got 6"),
    (lambda: ws.linear_bernoulli_log_prob(f(2, 3, 4), f(5, 4), f(5), f(4, 5)), ValueError,
     r"linear_bernoulli_log_prob: expected the leading dimensions of h and x to broadcast, got \[2, 3\] and \[4\]"),
    (lambda: ws.linear_bernoulli_log_prob_sum(f(2, 3), f(5, 3), f(5), f(2, 5), f(3)), ValueError,
     r"linear_bernoulli_log_prob_sum: expected sample_weight to broadcast to \[2\], the rows, got \[3\]"),
    (lambda: ws.linear_bernoulli_log_prob_sum(f(2, 3, requires_grad=True), f(5, 3), f(5), f(2, 5), f(3)), ValueError,
     r"linear_bernoulli_log_prob_sum: expected sample_weight to broadcast to \[2\], the rows, got \[3\]"),
    # dtypes
    (lambda: ws.linear_bernoulli_log_prob(f(3), f(5, 3, dtype=torch.int64), f(5), f(5)), TypeError,
     r"linear_bernoulli_log_prob: expected weight to be float64, float32, bfloat16 or float16, got Long"),
    (lambda: ws.linear_bernoulli_log_prob(f(3), f(5, 3), f(5), f(5, dtype=torch.int64)), TypeError,
     r"linear_bernoulli_log_prob: expected x to be bool, uint8 or floating, got Long"),
    (lambda: ws.linear_bernoulli_log_prob_sum(f(3), f(5, 3), f(5), f(5), f(1, dtype=torch.int64)), TypeError,
     r"linear_bernoulli_log_prob_sum: expected sample_weight to be float64"),
    (lambda: ws.linear_bernoulli_sample(f(3), f(5, 3), f(5), dtype=torch.int32), TypeError,
     r"linear_bernoulli_sample: expected dtype to be bool, uint8 or floating, got Int"),
    (lambda: ws.gaussian_kl(f(3, dtype=torch.int64), f(3)), TypeError,
     r"gaussian_kl: expected mu to be float64, float32, bfloat16 or float16, got Long"),
    (lambda: ws.gaussian_kl_between(f(3), f(3), f(3), f(3, dtype=torch.int64)), TypeError,
     r"gaussian_kl_between: expected prior_logvar to be float64, float32, bfloat16 or float16, got Long"),
    (lambda: ws.gaussian_rsample(f(3), f(3, dtype=torch.bool)), TypeError,
     r"gaussian_rsample: expected logvar to be float64"),
    (lambda: ws.gaussian_log_prob(f(3), f(3), f(3, dtype=torch.uint8)), TypeError,
     r"gaussian_log_prob: expected z to be float64"),
    (lambda: ws.standard_gaussian_log_prob(f(3, dtype=torch.complex64)), TypeError,
     r"standard_gaussian_log_prob: expected z to be float64"),
    (lambda: ws.bernoulli_log_prob(f(3), f(3, dtype=torch.int64)), TypeError,
     r"bernoulli_log_prob: expected x to be bool, uint8 or floating, got Long"),
    (lambda: ws.bernoulli_log_prob(f(3, dtype=torch.uint8), f(3)), TypeError,
     r"bernoulli_log_prob: expected logits to be float64"),
    (lambda: ws.bernoulli_sample(f(3), dtype=torch.int32), TypeError,
     r"bernoulli_sample: expected dtype to be bool, uint8 or floating, got Int"),
    # keys
    (lambda: ws.bernoulli_sample(f(3), key=f(2)), TypeError, r"bernoulli_sample: expected key to be int64, got Float"),
    (lambda: ws.gaussian_rsample(f(3), f(3), key=f(3, dtype=torch.int64)), ValueError,
     r"gaussian_rsample: expected key to have shape \[2\], \(seed, offset\), got \[3\]"),
    # gradients handed to the operators directly
    (lambda: torch.ops.wakesleep_ext.bernoulli_log_prob_backward(f(2), f(3, 5), f(3, 5)), ValueError,
     r"bernoulli_log_prob_backward: expected grad to have shape \[3\], got \[2\]"),
    (lambda: torch.ops.wakesleep_ext.gaussian_kl_between_backward(f(2), f(3), f(3), f(4, 3), f(3), True, True),
     ValueError, r"gaussian_kl_between_backward: expected grad to have shape \[4\], got \[2\]"),
    (lambda: torch.ops.wakesleep_ext.linear_bernoulli_log_prob_backward(
        f(3), f(2, 3), f(5, 3), f(5), f(2, 5), None, True, True), ValueError,
     r"linear_bernoulli_log_prob_backward: expected grad to broadcast to \[2\], the rows, got \[3\]"),
    (lambda: torch.ops.wakesleep_ext.linear_bernoulli_log_prob_backward(
        f(2), f(2, 3), f(5, 3), f(5), f(2, 5), f(2, 4), True, True), ValueError,
     r"linear_bernoulli_log_prob_backward: expected logits to have shape \[2, 5\] or \[0, 5\], got \[2, 4\]"),
    (lambda: torch.ops.wakesleep_ext.linear_bernoulli_log_prob_backward(
        f(2), f(2, 3), f(5, 3), f(5), f(2, 5), f(7, 0), True, True), ValueError,
     r"linear_bernoulli_log_prob_backward: expected logits to have shape \[2, 5\] or \[0, 5\], got \[7, 0\]"),
    (lambda: torch.ops.wakesleep_ext.gaussian_rsample_backward(f(2, 5), None, f(3, 5), f(3, 5), KEY, []), ValueError,
     r"gaussian_rsample_backward: expected grad_z to have shape \[3, 5\], got \[2, 5\]"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[message[:60] for _, _, message in CASES])
def test_message(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[message[:60] for _, _, message in CASES])
def test_meta_tensors_get_the_same_message(
    call: Callable[[], Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "f", partial(torch.zeros, device="meta"))
    monkeypatch.setitem(globals(), "KEY", KEY.to("meta"))
    with pytest.raises(error, match=message):
        call()


def test_a_hessian_names_what_works() -> None:
    def kl(mu: torch.Tensor) -> torch.Tensor:
        return ws.gaussian_kl(mu, mu).sum()

    mu = torch.randn(3, dtype=torch.float64)
    message = r"gaussian_kl.*forward-mode differentiation is not supported.*torch.func.jacrev\(jacrev\(f\)\)"
    for forward in (torch.func.hessian(kl), torch.func.jacfwd(kl)):
        with pytest.raises(NotImplementedError, match=message):
            forward(mu)
    expected = torch.diag(1 + mu.exp() / 2)  # of (mu^2 + e^mu - mu - 1) / 2, twice
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(kl))(mu), expected)


def test_devices_must_agree_with_meta() -> None:
    """If one tensor is on the meta device, a fake kernel makes the check."""
    meta = partial(f, device="meta")
    with pytest.raises(ValueError, match="gaussian_kl: expected logvar on cpu, the device of mu, got meta"):
        ws.gaussian_kl(f(3), meta(3))
    with pytest.raises(ValueError, match="adam_: expected lr on cpu, the device of "):
        ws.adam_([f(3)], [f(3)], [f(3)], [f(3)], f(()), meta(()), 0.9, 0.999, 1e-8)
    with pytest.raises(ValueError, match=r"mlp: expected biases\[0\] on meta, the device of h, got cpu"):
        ws.linear(meta(2, 3), meta(4, 3), f(4))


def test_devices_must_agree() -> None:
    operator = torch.ops.wakesleep_ext.gaussian_kl.default
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with pytest.raises(ValueError, match="gaussian_kl: expected logvar on cpu, the device of mu, got meta"):
        operator.redispatch(cpu, f(3), f(3, device="meta"))


def test_too_many_dimensions_that_do_not_merge() -> None:
    logits = f(*(2,) * 19, 1).permute(*reversed(range(19)), 19)
    with pytest.raises(
        RuntimeError, match="leading dimensions that merge into at most 8; make the arguments contiguous"
    ):
        ws.bernoulli_log_prob(logits, f(*(2,) * 19, 1))


def test_a_cuda_tensor_without_cuda_kernels() -> None:
    """The operators of a CPU build say what is missing. The test needs no GPU."""
    from wakesleep_ext import _build

    if _build.CUDA_VERSION is not None:
        pytest.skip("built with CUDA")
    operator = torch.ops.wakesleep_ext.standard_gaussian_log_prob.default
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(
        NotImplementedError, match=r"built without CUDA.*WAKESLEEP_FORCE_CUDA=1 in front of .* `wakesleep info`"
    ):
        operator.redispatch(cuda, f(3))


@pytest.fixture
def not_imported(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Unload the package until the end of the test. An import that fails must fail before it registers anything."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "wakesleep_ext"]:
        monkeypatch.delitem(sys.modules, name)
    return monkeypatch


def _import_error() -> str:
    with pytest.raises(ImportError) as raised:
        importlib.import_module("wakesleep_ext")
    return str(raised.value)


def test_a_build_for_another_torch_is_named(not_imported: pytest.MonkeyPatch) -> None:
    not_imported.setattr(torch, "__version__", "2.99.0")
    message = _import_error()
    assert message.startswith("wakesleep_ext was built for torch 2.")
    assert "found torch 2.99.0. Rebuild it for this torch: `pip install --force-reinstall" in message


def test_a_missing_build_is_named(not_imported: pytest.MonkeyPatch) -> None:
    not_imported.setitem(sys.modules, "wakesleep_ext._build", None)
    assert _import_error().startswith("wakesleep_ext has no compiled kernels")


def test_a_broken_binary_is_named(not_imported: pytest.MonkeyPatch) -> None:
    not_imported.setitem(sys.modules, "wakesleep_ext._C", None)
    message = _import_error()
    assert message.startswith("the compiled kernels of wakesleep_ext, built for torch")
    assert "Rebuild them" in message


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    """The ops, the command line and the benchmark import heavy packages only when they use them."""
    program = (
        "import sys, torch; before = set(sys.modules); import wakesleep_ext;"
        "assert not {'wakesleep_ext.cli', 'tyro'} & set(sys.modules);"
        "import wakesleep_ext.cli, wakesleep_ext.benchmark.run;"
        "heavy = {'matplotlib', 'PIL', 'sklearn', 'scipy', 'safetensors', 'tqdm', 'tensorboard', 'pyro'};"
        "print(*heavy & (set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr
