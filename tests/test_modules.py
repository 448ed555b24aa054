"""Layers and heads in the place of linear layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wakesleep_ext as ws
from wakesleep_ext import ops
from wakesleep_ext.modules import BernoulliHead, GaussianHead, Linear, Sequential, fuse
from wakesleep_ext.random import make_key

KINDS = pytest.mark.parametrize("kind", [Linear, BernoulliHead, GaussianHead])
BIAS = pytest.mark.parametrize("bias", [True, False])


@KINDS
@BIAS
def test_a_layer_shares_the_parameters_of_the_one_it_takes_the_place_of(kind: type, bias: bool) -> None:
    linear = nn.Linear(3, 4, bias=bias).eval()
    layer = kind.from_linear(linear)  # type: ignore[attr-defined]
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    assert layer.state_dict().keys() == linear.state_dict().keys()
    other = kind(3, 4, bias)
    other.load_state_dict(linear.state_dict())
    assert torch.equal(copy.deepcopy(layer).weight, other.weight)
    assert repr(layer) == f"{kind.__name__}(in_features=3, out_features=4, bias={bias})"


@KINDS
def test_a_new_layer_starts_as_a_linear_one_does(kind: type) -> None:
    torch.manual_seed(3)
    linear = nn.Linear(3, 4)
    torch.manual_seed(3)
    assert torch.equal(kind(3, 4).weight, linear.weight)


@BIAS
def test_what_layers_compute_is_what_the_ops_compute(bias: bool) -> None:
    h, x, key = torch.randn(5, 3), torch.randint(2, (5, 4)).bool(), make_key(1)
    linear = nn.Linear(3, 4, bias=bias)
    pixels, z = BernoulliHead.from_linear(linear), GaussianHead.from_linear(linear)
    output = linear(h)
    torch.testing.assert_close(Linear.from_linear(linear, "tanh")(h), output.tanh())
    for layer in (Linear.from_linear(linear), pixels, z):
        torch.testing.assert_close(layer(h), output)
    torch.testing.assert_close(pixels.log_prob(h, x), ws.bernoulli_log_prob(output, x))
    importance = torch.randn(5)
    expected = (importance * ws.bernoulli_log_prob(output, x)).sum()
    torch.testing.assert_close(pixels.log_prob_sum(h, x, importance), expected)
    assert torch.equal(pixels.sample(h, key=key, dtype=torch.bool), ws.bernoulli_sample(output, key=key).bool())

    mu, logvar = output.chunk(2, -1)
    torch.testing.assert_close(z.moments(h), (mu, logvar))
    draw, log_q = z.rsample_log_prob(h, (2,), key=key)
    torch.testing.assert_close((draw, log_q), ws.gaussian_rsample_log_prob(mu, logvar, (2,), key=key))
    torch.testing.assert_close(z.log_prob(h, draw), ws.gaussian_log_prob(mu, logvar, draw))
    torch.testing.assert_close(z.distribution(h).log_prob(draw), ws.gaussian_log_prob(mu, logvar, draw))


def test_a_head_in_somebodys_model_trains_it() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6))
    state = model.state_dict().keys()
    model[2] = BernoulliHead.from_linear(model[2])
    assert model.state_dict().keys() == state
    x = torch.randint(2, (8, 6)).float()
    (-model[2].log_prob(model[:2](x), x).mean()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_a_fused_model_is_the_same_model() -> None:
    class Twice(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.GELU(), Twice(5, 5), nn.Tanh())
            self.heads = nn.ModuleList([nn.Sequential(nn.Linear(5, 4, bias=False), nn.Sigmoid()), nn.Linear(5, 3)])
            self.watched = nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh())
            self.watched[0].register_forward_hook(lambda *_: seen.append("layer"))
            self.watched[3].register_forward_hook(lambda *_: seen.append("activation"))

        def forward(self, x: Tensor) -> list[Tensor]:
            h = self.trunk(x)
            return [head(h) for head in (*self.heads, self.watched)]

    seen: list[str] = []
    model, x = Model(), torch.randn(7, 6)
    parameters, state, expected = list(model.parameters()), list(model.state_dict()), model(x)
    assert fuse(model) is model
    assert [type(module) for module in model.trunk] == [Linear, nn.ReLU, Linear, nn.GELU, Twice, nn.Tanh]
    assert [type(module) for module in model.children()] == [Sequential, nn.ModuleList, Sequential]
    assert [type(module) for module in model.heads] == [Sequential, Linear]
    torch.testing.assert_close(model(x), expected)
    assert seen == ["layer", "activation"] * 2
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == state


@pytest.mark.parametrize(
    ("names", "calls"),
    [
        ("linear", [1]),
        ("linear tanh linear tanh linear", [3]),
        ("linear tanh linear tanh linear relu", [3]),
        ("linear tanh linear relu linear", [2, 1]),
        ("linear linear tanh linear", [2, 1]),
        ("linear relu relu linear sigmoid", [1, 1]),
        ("relu linear gelu linear", [1, 1]),
        ("activated linear relu", [2]),
        ("activated relu linear", [1, 1]),
        ("gelu", []),
        ("", []),
    ],
)
def test_layers_that_follow_each_other_are_one_call(
    monkeypatch: pytest.MonkeyPatch, names: str, calls: list[int]
) -> None:
    make = {
        "linear": lambda: nn.Linear(4, 4),
        "activated": lambda: Linear(4, 4, activation="relu"),
        "tanh": nn.Tanh,
        "relu": nn.ReLU,
        "sigmoid": nn.Sigmoid,
        "gelu": nn.GELU,
    }
    found: list[int] = []

    def perceptron(h: Tensor, weights: Sequence[Tensor], *rest: Any) -> Tensor:
        found.append(len(weights))
        return ops.perceptron(h, weights, *rest)

    modules, h = [make[name]() for name in names.split()], torch.randn(3, 4)  # type: ignore[no-untyped-call]
    monkeypatch.setattr("wakesleep_ext.modules.ops", SimpleNamespace(perceptron=perceptron, linear=ops.linear))
    torch.testing.assert_close(Sequential(*modules)(h), nn.Sequential(*modules)(h))
    assert found == calls


def test_an_unknown_activation_is_refused() -> None:
    for make in (lambda: Linear(3, 4, activation="gelu"), lambda: Linear.from_linear(nn.Linear(3, 4), "gelu")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"expected activation to be None or one of \('relu', .*\), got 'gelu'"):
            make()


def test_what_is_no_linear_layer_and_what_cannot_be_halved_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"BernoulliHead\.from_linear: expected linear to be an nn\.Linear, got .*Conv2d"
    ):
        BernoulliHead.from_linear(nn.Conv2d(1, 1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected out_features .* to be even, got 5"):
        GaussianHead.from_linear(nn.Linear(3, 5))
