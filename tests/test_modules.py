"""Test layers and heads that replace linear layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import wakesleep_ext as ws
from wakesleep_ext import ops
from wakesleep_ext.densities import LinearBernoulli
from wakesleep_ext.helmholtz.conditionals import LinearBernoulliConditional
from wakesleep_ext.helmholtz.networks import MultilayerPerceptron
from wakesleep_ext.modules import BernoulliHead, GaussianHead, Linear, Sequential, fuse
from wakesleep_ext.random import make_key

KINDS = pytest.mark.parametrize("kind", [Linear, BernoulliHead, GaussianHead])
BIAS = pytest.mark.parametrize("bias", [True, False])


@pytest.fixture
def calls_of_the_op(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record how many layers each call of the op computes."""
    found: list[int] = []
    original = ops.mlp

    def mlp(h: Tensor, weights: Sequence[Tensor], *rest: Any) -> Tensor:
        found.append(len(weights))
        return original(h, weights, *rest)

    monkeypatch.setattr(ops, "mlp", mlp)
    return found


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
    p = pixels.distribution(h)
    for recompute in (None, True, False):
        torch.testing.assert_close(p.log_prob(x, recompute=recompute), ws.bernoulli_log_prob(output, x))
    sample_weight = torch.randn(5)
    expected = (sample_weight * ws.bernoulli_log_prob(output, x)).sum()
    torch.testing.assert_close(p.log_prob_sum(x, sample_weight), expected)
    torch.testing.assert_close(p.log_prob_sum(x), ws.bernoulli_log_prob(output, x).sum())
    assert torch.equal(p.rsample(key=key), ws.bernoulli_sample(output, key=key))

    mu, logvar = output.chunk(2, -1)
    q = z.distribution(h)
    torch.testing.assert_close((q.mu, q.logvar), (mu, logvar))
    draw, log_q = q.rsample_log_prob((2,), key=key)
    torch.testing.assert_close((draw, log_q), ws.gaussian_rsample_log_prob(mu, logvar, (2,), key=key))
    torch.testing.assert_close(q.log_prob(draw), ws.gaussian_log_prob(mu, logvar, draw))
    torch.testing.assert_close(q.log_prob_sum(draw), ws.gaussian_log_prob(mu, logvar, draw).sum())


def test_a_head_in_somebodys_model_trains_it() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6))
    state = model.state_dict().keys()
    model[2] = BernoulliHead.from_linear(model[2])
    assert model.state_dict().keys() == state
    x = torch.randint(2, (8, 6)).float()
    (-model[2].distribution(model[:2](x)).log_prob(x).mean()).backward()
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
    assert [type(module) for module in model.trunk] == [nn.Linear, nn.ReLU, nn.Linear, nn.GELU, Twice, nn.Tanh]
    assert [type(module) for module in model.children()] == [Sequential, nn.ModuleList, Sequential]
    assert [type(module) for module in model.heads] == [Sequential, nn.Linear]
    torch.testing.assert_close(model(x), expected)
    assert seen == ["layer", "activation"] * 2
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == state


@pytest.mark.parametrize(
    ("names", "calls"),
    [
        ("linear", []),
        ("linear tanh", [1]),
        ("linear linear", [2]),
        ("linear tanh linear tanh linear", [3]),
        ("linear tanh linear tanh linear relu", [3]),
        ("linear tanh linear relu linear", [2]),
        ("linear linear tanh linear", [2]),
        ("linear relu relu linear sigmoid", [1, 1]),
        ("relu linear gelu linear", []),
        ("activated linear relu", [2]),
        ("activated relu linear", [1]),
        ("bernoulli relu gaussian", [2]),
        ("gelu", []),
        ("", []),
    ],
)
def test_layers_that_follow_each_other_are_one_call(calls_of_the_op: list[int], names: str, calls: list[int]) -> None:
    make = {
        "linear": lambda: nn.Linear(4, 4),
        "activated": lambda: Linear(4, 4, activation="relu"),
        "bernoulli": lambda: BernoulliHead(4, 4),
        "gaussian": lambda: GaussianHead(4, 4),
        "tanh": nn.Tanh,
        "relu": nn.ReLU,
        "sigmoid": nn.Sigmoid,
        "gelu": nn.GELU,
    }
    modules, h = [make[name]() for name in names.split()], torch.randn(3, 4)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(Sequential(*modules)(h), nn.Sequential(*modules)(h))
    assert calls_of_the_op == calls


class Doubled(Tensor):
    """A weight, bias or input that makes `F.linear` return twice its result."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return 2 * result.as_subclass(Tensor) if func is F.linear else result


class Activated(nn.Linear):
    """A layer that stores an activation, but leaves its use to the caller."""

    activation = "tanh"


class Shifted(nn.Tanh):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def _with_forward(module: nn.Module) -> None:
    original = module.forward
    module.forward = lambda h: 3 * original(h)


def _doubled(layer: nn.Linear, name: str) -> None:
    own = nn.Parameter(getattr(layer, name).detach().as_subclass(Doubled))
    assert type(own) is Doubled
    layer.register_parameter(name, own)


def _prune(layer: nn.Linear) -> None:
    prune.l1_unstructured(layer, "weight", 7)


def _remove(layer: nn.Linear) -> None:
    """Replace the weight parameter by a plain tensor."""
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = 2 * weight  # type: ignore[assignment]


LAYER_CHANGES: dict[str, Callable[[nn.Linear], Any]] = {
    "forward": _with_forward,
    "pre-hook": lambda layer: layer.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],)),
    "hook": lambda layer: layer.register_forward_hook(lambda *_: 2 * _[2]),
    "backward hook": lambda layer: layer.register_full_backward_hook(lambda *_: (5 * _[1][0],)),
    "backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(lambda *_: (5 * _[1][0],)),
    "subclass": lambda layer: setattr(layer, "__class__", Activated),
    "attribute": lambda layer: setattr(layer, "activation", "tanh"),
    "weight subclass": lambda layer: _doubled(layer, "weight"),
    "bias subclass": lambda layer: _doubled(layer, "bias"),
    "pruned": _prune,
    "parametrized": lambda layer: parametrizations.weight_norm(layer),
    "spectral norm": lambda layer: nn.utils.spectral_norm(layer),
    "no parameter": _remove,
}
STAYS_PLAIN = {"attribute"}


@pytest.mark.parametrize("change", LAYER_CHANGES)
def test_a_layer_that_is_not_plain_is_called(calls_of_the_op: list[int], change: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 4), nn.Sigmoid()).eval()
    LAYER_CHANGES[change](model[2])
    x, parameters = torch.randn(7, 6, requires_grad=True), list(model.parameters())
    expected = model(x)
    gradients = torch.autograd.grad(expected.sum(), (x, *parameters))
    found = fuse(model)(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), (x, *parameters)), gradients)
    assert calls_of_the_op == ([2, 1] if change in STAYS_PLAIN else [1, 1])


@pytest.mark.parametrize(
    "change",
    [
        _with_forward,
        lambda activation: activation.register_forward_hook(lambda *_: 2 * _[2]),
        lambda activation: setattr(activation, "__class__", Shifted),
    ],
    ids=["forward", "hook", "subclass"],
)
def test_an_activation_that_is_not_plain_is_called(
    calls_of_the_op: list[int], change: Callable[[nn.Module], Any]
) -> None:
    model, x = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2), nn.Tanh()), torch.randn(2, 4, 3)
    change(model[1])
    expected = model(x)
    torch.testing.assert_close(fuse(model)(x), expected)
    assert calls_of_the_op == [1]


def test_a_class_whose_forward_is_replaced_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2), nn.ReLU()), torch.randn(5, 3)
    original = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda layer, h: original(layer, h) + 1)
    expected = model(x)
    torch.testing.assert_close(fuse(model)(x), expected)


def test_a_compiled_layer_is_called() -> None:
    layer = Linear(3, 8, activation="relu")
    layer.compile(backend=lambda graph, _: lambda *arguments: [3 * result for result in graph(*arguments)])
    model, h = nn.Sequential(layer, nn.Linear(8, 2)), torch.randn(5, 3)
    torch.testing.assert_close(fuse(model)(h), model[1](3 * layer.forward(h)))


def test_a_single_layer_is_left_to_torch_on_a_cpu_alone(calls_of_the_op: list[int]) -> None:
    model = fuse(nn.Sequential(nn.Linear(3, 8), nn.GELU()))
    model(torch.randn(5, 3))
    assert calls_of_the_op == []
    assert model.to("meta")(torch.randn(5, 3, device="meta")).shape == (5, 8)
    assert calls_of_the_op == [1]


@pytest.mark.parametrize(
    "register",
    [
        "register_module_forward_pre_hook",
        "register_module_forward_hook",
        "register_module_full_backward_pre_hook",
        "register_module_full_backward_hook",
    ],
)
def test_global_hooks_see_every_module(calls_of_the_op: list[int], register: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Sequential(nn.Linear(5, 4), nn.ReLU()), nn.Linear(4, 2))
    seen: list[type] = []

    def run() -> list[type]:
        seen.clear()
        with getattr(nn.modules.module, register)(lambda module, *_: seen.append(type(module))):
            model(torch.randn(3, 6, requires_grad=True)).sum().backward()
        return [nn.Sequential if kind is Sequential else kind for kind in seen]

    expected = run()
    fuse(model)
    assert run() == expected
    assert len(expected) == 7
    assert calls_of_the_op == []
    model(torch.randn(3, 6))
    assert calls_of_the_op == [1, 1]


def _nested(x: Tensor, layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([x[:2], x[2:]], layout=layout)


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": lambda x: x.relu().to_sparse(),
    "sparse CSR": lambda x: x.relu().to_sparse_csr(),
    "nested": lambda x: _nested(x, torch.strided),
    "jagged": lambda x: _nested(x, torch.jagged),
    "subclass": lambda x: x.as_subclass(Doubled),
}
if torch.backends.mkldnn.is_available():
    INPUTS["mkldnn"] = lambda x: x.to_mkldnn()


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("first", ["linear", "activated", "head"])
@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:The PyTorch API of nested:UserWarning")
def test_inputs_that_the_ops_do_not_take(kind: str, first: str) -> None:
    linear, x = nn.Linear(6, 4), INPUTS[kind](torch.randn(5, 6))
    layer = {
        "linear": linear,
        "activated": Linear.from_linear(linear, "tanh"),
        "head": BernoulliHead.from_linear(linear),
    }[first]
    rest = (nn.Linear(4, 3), nn.Tanh())
    expected = nn.Sequential(linear, *[nn.Tanh()] * (first == "activated"), *rest)(x)
    found = fuse(nn.Sequential(layer, *rest))(x)
    if kind in ("nested", "jagged"):
        torch.testing.assert_close(list(found.unbind()), list(expected.unbind()))
    else:
        torch.testing.assert_close(found.to_dense(), expected.to_dense())


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_layer_of_ours_with_a_parameter_of_a_subclass(name: str) -> None:
    linear, h = nn.Linear(3, 5), torch.randn(2, 3)
    expected = (2 * linear(h)).relu()
    layer = Linear.from_linear(linear, "relu")
    _doubled(layer, name)
    torch.testing.assert_close(layer(h), expected)


def test_complex_layers_are_torchs_own() -> None:
    layers = [nn.Linear(3, 8, dtype=torch.complex64), nn.Tanh(), nn.Linear(8, 2, dtype=torch.complex64)]
    model, x = nn.Sequential(*layers), torch.randn(5, 3, dtype=torch.complex64)
    expected = model(x)
    torch.testing.assert_close(fuse(model)(x), expected)


def test_forward_mode_goes_through_layers() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU())
    x, tangent = torch.randn(7, 6), torch.randn(7, 6)
    expected = torch.func.jvp(model, (x,), (tangent,))
    torch.testing.assert_close(torch.func.jvp(fuse(model), (x,), (tangent,)), expected)
    expected = torch.func.jvp(lambda h: model[0](h).tanh(), (x,), (tangent,))
    torch.testing.assert_close(torch.func.jvp(Linear.from_linear(model[0], "tanh"), (x,), (tangent,)), expected)


class Tempered(MultilayerPerceptron):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 4


MLP_CHANGES: dict[str, Callable[[MultilayerPerceptron], Any]] = {
    "forward": _with_forward,
    "forward of the head": lambda network: _with_forward(network.head),
    "subclass": lambda network: setattr(network, "__class__", Tempered),
    "head with an activation": lambda network: network.__setitem__(4, Linear.from_linear(network.head, "relu")),
    "head of a subclass": lambda network: _doubled(network.head, "weight"),
}


@pytest.mark.parametrize("change", MLP_CHANGES)
@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_the_logits_of_a_conditional_are_those_of_its_network(change: str, activation: Literal["tanh", "gelu"]) -> None:
    network, z, x = MultilayerPerceptron((3, 8, 5, 6), activation), torch.randn(4, 2, 3), torch.randint(2, (2, 6))
    conditional, x = LinearBernoulliConditional(network), x.bool()
    assert type(conditional(z)) is LinearBernoulli
    before = conditional(z).log_prob(x)
    MLP_CHANGES[change](network)
    expected = ws.bernoulli_log_prob(network(z), x)
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(conditional(z).log_prob(x), expected)


def test_global_hooks_see_the_network_of_a_conditional() -> None:
    conditional, seen = LinearBernoulliConditional(MultilayerPerceptron((3, 8, 6), "relu")), []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module))):
        conditional(torch.randn(4, 3))
    assert seen == [nn.Linear, nn.ReLU, nn.Linear, MultilayerPerceptron, LinearBernoulliConditional]


@pytest.mark.filterwarnings("ignore:.*quantiz.*")
def test_quantize_dynamic_finds_the_layers_of_a_fused_model() -> None:
    model = nn.ModuleDict(
        {"trunk": nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), "head": nn.Linear(4, 3)}
    )
    expected = quantize_dynamic(model)
    found = quantize_dynamic(fuse(model))
    assert [type(module) for module in found["trunk"]] == [type(module) for module in expected["trunk"]]
    assert type(found["trunk"][0]) is type(found["head"]) is not nn.Linear
    x = torch.randn(7, 6)
    assert torch.equal(found["head"](found["trunk"](x)), expected["head"](expected["trunk"](x)))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_has_the_op(strict: bool) -> None:
    model, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(5, 3)
    expected = model(x)
    program = torch.export.export(fuse(model), (x,), strict=strict)
    assert torch.ops.wakesleep_ext.mlp.default in [node.target for node in program.graph.nodes]
    torch.testing.assert_close(program.module()(x), expected)


def test_a_fused_model_is_compiled_whole() -> None:
    model, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2), nn.GELU(), nn.Linear(2, 2)), torch.randn(5, 3)
    expected = model(x)
    torch.testing.assert_close(torch.compile(fuse(model), fullgraph=True, backend="eager")(x), expected)


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
