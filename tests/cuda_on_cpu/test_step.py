"""The kernels of a training step: how many there are, and that they compute what the public ops compute one by one."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from counting import kernels_of
from emulation import cuda_kernels
from torch import Tensor

import wakesleep_ext as ws
from wakesleep_ext import gradients
from wakesleep_ext.helmholtz.config import ModelConfig
from wakesleep_ext.helmholtz.models import HelmholtzMachine
from wakesleep_ext.random import make_key
from wakesleep_ext.training.config import TrainConfig
from wakesleep_ext.training.data import Images
from wakesleep_ext.training.step import Step

pytestmark = pytest.mark.source_tree

SEED, D, H, K = 3, 36, 20, 6
KEYS = 5  # a step has one key each for the order, binarize and the wake phase, and two for the dream


def _step(batch: int, num_samples: int) -> Step:
    torch.manual_seed(0)
    images = Images(torch.randint(0, 256, (2 * batch, D), dtype=torch.uint8), white=255, shape=(6, 6))
    machine = HelmholtzMachine.from_config(ModelConfig(D, (K,), (H, H), (H, H)), images.mean())
    return Step(machine, images, TrainConfig(batch_size=batch, num_samples=num_samples, replay=False, seed=SEED))


def test_a_step_of_a_small_batch_has_25_kernels() -> None:
    step, index = _step(20, 1), torch.arange(20)
    with cuda_kernels():
        found = Counter(kernels_of(lambda: step._train(index, awake=True)))
    expected = {
        "advance_": 1,  # random keys and Adam's step counts
        "binarize": 1,
        "mlp": 2 + 2,  # the features of the recognition network in the wake phase, and of the dream
        "linear_gaussian_rsample": 1,
        "gaussian_rsample": 1,
        "mlp_with_hidden": 2 + 3,
        "linear_bernoulli_log_prob_and_gradients": 2,
        "mlp_backward": 2 + 3,
        "adam_": 2,
        "linear_bernoulli_sample": 1,
        "gaussian_log_prob_and_gradients": 1,
        "cat": 1,
    }
    assert found == expected
    assert found.total() == 25


def test_several_steps_have_their_kernels_and_stack_their_losses_once() -> None:
    step, index = _step(20, 1), torch.arange(20).expand(3, 20)
    with cuda_kernels():
        found = Counter(kernels_of(lambda: step._train(index, awake=True)))
    assert found["cat"] == 1
    assert found.total() == 3 * 24 + 1


@pytest.mark.parametrize("num_samples", [5, 50])
def test_a_step_of_many_rows_has_16_kernels_besides_its_products(num_samples: int) -> None:
    """Each layer of a small batch counts as its products: one forward, and one or two backward."""
    step, index = _step(100, num_samples), torch.arange(100)
    with cuda_kernels():
        found = kernels_of(lambda: step._train(index, awake=True))
    blas = sum(name.startswith("GEMM ") for name in found)
    small = {"mlp": 2 + 2, "mlp_with_hidden": 3, "mlp_backward": 3}
    small |= {"linear_bernoulli_sample": 1, "linear_gaussian_rsample": 1}
    assert blas == 8
    assert len(found) == 36
    assert len(found) - blas - sum(small.values()) == 16


def _adam(parameters: list[Tensor], gradients: list[Tensor], states: list[tuple[Tensor, Tensor]], t: int) -> None:
    exp_avgs, exp_avg_sqs = ([state[slot] for state in states] for slot in (0, 1))
    step, lr = torch.tensor(float(t)), torch.tensor(TrainConfig().generative_learning_rate, dtype=torch.float64)
    beta1, beta2 = TrainConfig().adam_betas
    ws.adam_(parameters, gradients, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, TrainConfig().adam_epsilon)


def _layers(network: torch.nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    parameters = dict(network.named_parameters())
    return (
        [value for name, value in parameters.items() if name.endswith("weight")],
        [value for name, value in parameters.items() if name.endswith("bias")],
    )


@pytest.mark.parametrize(("batch", "num_samples"), [(20, 1), (30, 9)])
def test_a_step_computes_what_the_ops_compute_one_by_one(batch: int, num_samples: int) -> None:
    """Every bit is the same after two steps."""
    step, other = _step(batch, num_samples), _step(batch, num_samples)
    generative, recognition = other.machine.generative, other.machine.recognition
    (p_weights, p_biases), (q_weights, q_biases) = _layers(generative), _layers(recognition)
    p, q = list(generative.parameters()), list(recognition.parameters())
    moments = {id(w): (torch.zeros_like(w), torch.zeros_like(w)) for w in (*p, *q)}
    zeros = torch.zeros(K)
    rows = batch * num_samples
    with cuda_kernels():
        for number in range(2):
            index = torch.arange(number * batch, (number + 1) * batch)
            losses = step(index)
            keys = [make_key(SEED, number * KEYS + draw) for draw in range(KEYS)]
            with torch.no_grad():
                x = ws.binarize(other.images.grey, 255, index, dtype=torch.float32, key=keys[1])
                mu, logvar = ws.mlp(x, q_weights, q_biases, "tanh").chunk(2, -1)
                z = ws.gaussian_rsample(mu, logvar, (num_samples,), key=keys[2])
            h = ws.mlp(z, p_weights[:-1], p_biases[:-1], "tanh", "tanh")
            wake = ws.linear_bernoulli_log_prob_sum(h, p_weights[-1], p_biases[-1], x, scale=-1 / rows)
            gradients = torch.autograd.grad(wake, p)
            with torch.no_grad():
                _adam(p, list(gradients), [moments[id(w)] for w in p], number + 1)
                z = ws.gaussian_rsample(zeros, zeros, (batch,), key=keys[3])
                h = ws.mlp(z, p_weights[:-1], p_biases[:-1], "tanh", "tanh")
                x = ws.linear_bernoulli_sample(h, p_weights[-1], p_biases[-1], key=keys[4])
            packed = ws.mlp(x, q_weights, q_biases, "tanh")
            sleep = ws.gaussian_log_prob_sum(*ws.gaussian_parameters(packed), z, scale=-1 / batch)
            gradients = torch.autograd.grad(sleep, q)
            with torch.no_grad():
                _adam(q, list(gradients), [moments[id(w)] for w in q], number + 1)
            assert torch.equal(losses, torch.stack([wake.detach(), sleep.detach()]))
            for ours, theirs in zip(step.machine.parameters(), other.machine.parameters(), strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rows", [20, 300])
def test_an_upstream_gradient_of_one_launches_no_kernel(rows: int) -> None:
    h, weight, bias = torch.randn(rows, H), torch.randn(D, H, requires_grad=True), torch.randn(D)
    x, one = torch.ones(rows, D), gradients.unit_gradient()
    with cuda_kernels():
        loss = ws.linear_bernoulli_log_prob_sum(h, weight, bias, x)
        assert kernels_of(lambda: loss.backward(one)) == []
        first = weight.grad
        weight.grad = None
        loss = ws.linear_bernoulli_log_prob_sum(h, weight, bias, x)
        with torch.no_grad():
            one.mul_(2)
        assert kernels_of(lambda: loss.backward(one)) == ["_foreach_mul_"]
    assert first is not None
    assert weight.grad is not None
    assert torch.equal(weight.grad, 2 * first)
