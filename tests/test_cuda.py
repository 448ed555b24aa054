"""Test what needs a GPU: graphs, streams, no synchronisation, memory, and the same draws as on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from cases import SMALL, Case, make_key
from test_training import make_trainer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

import wakesleep_ext as ws
from wakesleep_ext._op_table import FLOATING
from wakesleep_ext.helmholtz.config import ModelConfig
from wakesleep_ext.training.data import Images
from wakesleep_ext.training.trainer import Trainer

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)


def _forward_and_backward(case: Case) -> tuple[Callable[..., list[Tensor]], tuple[Tensor, ...]]:
    wide = case.wide(67, 785)
    inputs = wide.inputs(torch.float32, "cuda", requires_grad=True)
    key = make_key("cuda")
    function = wide.function(key=key)

    def run() -> list[Tensor]:
        results = function(*inputs)
        results = [results] if isinstance(results, Tensor) else list(results)
        if not results[0].requires_grad:
            return results
        gradients = torch.autograd.grad(results, inputs, [torch.ones_like(r) for r in results], allow_unused=True)
        return [tensor.detach() for tensor in (*results, *gradients) if tensor is not None]

    return run, inputs


def _capture(function: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_graph_replays_what_was_captured(case: Case) -> None:
    run, inputs = _forward_and_backward(case)
    graph, captured = _capture(run)
    for scale in (1.0, 0.5):
        with torch.no_grad():
            for tensor in inputs:
                tensor.mul_(scale)
        graph.replay()
        for got, expected in zip(captured, run(), strict=True):
            assert torch.equal(got, expected)


def _draw_all() -> list[Tensor]:
    mu, logits = torch.zeros(1000, device="cuda"), torch.zeros(1000, device="cuda")
    return [ws.gaussian_rsample(mu, mu), *ws.gaussian_rsample_log_prob(mu, mu), ws.bernoulli_sample(logits)]


def test_replays_draw_fresh_noise_and_the_seed_governs_it() -> None:
    graph, captured = _capture(_draw_all)

    def replays() -> list[list[Tensor]]:
        torch.cuda.manual_seed(11)
        found = []
        for _ in range(3):
            graph.replay()
            found.append([tensor.clone() for tensor in captured])
        return found

    first, again = replays(), replays()
    for one, same in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    for earlier, later in ((0, 1), (1, 2), (0, 2)):
        assert not any(torch.equal(a, b) for a, b in zip(first[earlier], first[later], strict=True))
    assert not torch.equal(captured[0], captured[1])  # two draws in one graph


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_side_streams(case: Case) -> None:
    run, _ = _forward_and_backward(case)
    expected = run()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000)  # whatever goes to another stream comes too early
        found = run()
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_nothing_waits_for_the_device(case: Case) -> None:
    run, _ = _forward_and_backward(case)
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
        ws.random.draw_key("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_draws_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    mu, logvar, logits = torch.randn(3, 300, 785, generator=generator, dtype=torch.float64).to(dtype)
    key = make_key()
    on_cpu = ws.gaussian_rsample(mu, logvar, key=key).double()
    on_cuda = ws.gaussian_rsample(mu.cuda(), logvar.cuda(), key=key.cuda()).cpu().double()
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    scale = mu.double().abs() + 7 * (0.5 * logvar.double()).exp()
    assert ((on_cuda - on_cpu).abs() <= 8 * torch.finfo(dtype).eps * scale).all()
    unequal = ws.bernoulli_sample(logits.cuda(), key=key.cuda()).cpu() != ws.bernoulli_sample(logits, key=key)
    u, p = ws.random.uniforms(key, logits.shape, compute).double(), torch.sigmoid(logits.double())
    assert ((u - p).abs() <= 8 * torch.finfo(compute).eps * p)[unequal].all()


def test_more_than_two_to_the_31_elements() -> None:
    rows, width = 2**21 + 3, 1025
    if torch.cuda.mem_get_info()[0] < 6 * rows * width:
        pytest.skip("not enough memory on this GPU")
    logits = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    logits[-1] = torch.linspace(-3, 3, width)
    x = torch.ones(width, dtype=torch.uint8, device="cuda")
    found = ws.bernoulli_log_prob(logits, x)
    # an odd row is cut where its boundaries are, and summed accordingly
    assert_close(found[-1], ws.bernoulli_log_prob(logits[-1].clone(), x))
    assert_close(found[:-1], found[0].expand(rows - 1))
    key = make_key("cuda")
    draws = ws.bernoulli_sample(logits, dtype=torch.uint8, key=key)
    # the last rows, whose indices need more than 32 bits, differ from those 2**32 words before, had they wrapped
    assert 0.4 < draws[-3:-1].double().mean() < 0.6
    assert not torch.equal(draws[-2], draws[0])


def test_a_sampler_keeps_its_key_and_a_density_nothing_new() -> None:
    mu, logvar = torch.zeros(2, 1000, 1024, device="cuda").unbind()
    mu.requires_grad_()

    def kept(function: Callable[[], Tensor]) -> int:
        torch.cuda.synchronize()
        before = requested()
        result = function()
        return requested() - before - result.untyped_storage().nbytes()

    def requested() -> int:  # what is allocated may be the rest of a block, too
        return int(torch.cuda.memory_stats()["requested_bytes.all.current"])

    assert kept(lambda: ws.gaussian_rsample(mu, logvar)) <= 512
    assert kept(lambda: ws.gaussian_log_prob(mu, logvar, logvar)) <= 512
    assert kept(lambda: ws.bernoulli_log_prob(mu, logvar)) <= 512


def test_results_repeat_bit_for_bit() -> None:
    for case in SMALL:
        run, _ = _forward_and_backward(case)
        for a, b in zip(run(), run(), strict=True):
            assert torch.equal(a, b)


def record(trainer: Trainer, batches: Sequence[Tensor]) -> None:
    """Make the first two calls. The second one records itself."""
    for index in batches[:2]:
        trainer.take_step(index)


STEPS_PER_REPLAY = pytest.mark.parametrize("steps", [1, 2])


@STEPS_PER_REPLAY
def test_a_replay_is_one_launch(steps: int) -> None:
    trainer = make_trainer(device="cuda", steps_per_replay=steps)
    batches = trainer.take_step.batches()
    record(trainer, batches)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for index in batches:
            trainer.take_step(index)
        torch.cuda.synchronize()
    calls = Counter(event.name for event in profiler.events())
    assert calls["cudaGraphLaunch"] == len(batches) == 4 // steps


@STEPS_PER_REPLAY
def test_a_replayed_step_does_not_wait_for_the_device(steps: int) -> None:
    trainer = make_trainer(device="cuda", learning_rate_decay=0.1, steps_per_replay=steps)
    batches = trainer.take_step.batches()
    record(trainer, batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for index in batches:
            trainer.take_step(index)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_tf32_changes_the_products_of_a_step_alone() -> None:
    """The losses are near those in float32, and other products keep their precision."""
    images = Images(torch.randint(256, (1000, 784), dtype=torch.uint8), white=255, shape=(28, 28))
    model = ModelConfig(784, (50,), (200,), (200,))

    def losses(precision: str) -> Tensor:
        options = {"batch_size": 500, "num_samples": 5, "precision": precision}
        trainer = make_trainer(images, "cuda", model, **options)
        return torch.stack([trainer.take_step(index) for index in trainer.take_step.batches() * 2])

    a, b = torch.randn(2, 512, 512, device="cuda")
    exact = a @ b
    wide, narrow = losses("float32"), losses("tf32")
    assert not torch.equal(wide, narrow)
    assert_close(narrow, wide, rtol=1e-3, atol=0.0)
    assert torch.equal(a @ b, exact)
