"""Our distributions beside torch's own, under the checks that torch makes of its distributions."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Independent, Normal, constraints, kl_divergence

import wakesleep_ext as ws
from wakesleep_ext.distributions import BernoulliVector, DiagonalGaussian
from wakesleep_ext.random import make_key

K = 5
BATCH_SHAPES = [(), (3,), (4, 1, 3)]
SAMPLE_SHAPES = [(), (2,), (2, 3)]


def gaussian(*batch: int, **options: Any) -> tuple[DiagonalGaussian, Independent]:
    mu, logvar = torch.randn(2, *batch, K, dtype=torch.float64)
    return DiagonalGaussian(mu, logvar, **options), Independent(Normal(mu, (logvar / 2).exp()), 1)


def bernoulli(*batch: int, **options: Any) -> tuple[BernoulliVector, Independent]:
    logits = torch.randn(*batch, K, dtype=torch.float64)
    return BernoulliVector(logits, **options), Independent(Bernoulli(logits=logits), 1)


@pytest.fixture(autouse=True)
def _validated(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by default, whatever other code of the process has chosen for all distributions."""
    monkeypatch.setattr(Distribution, "_validate_args", True)


KINDS = pytest.mark.parametrize("make", [gaussian, bernoulli])
Make = Callable[..., tuple[Any, Independent]]


@KINDS
@pytest.mark.parametrize(("batch", "sample"), list(product(BATCH_SHAPES, SAMPLE_SHAPES)))
def test_shapes_and_densities_are_those_of_torch(make: Make, batch: tuple[int, ...], sample: tuple[int, ...]) -> None:
    ours, theirs = make(*batch)
    assert (ours.batch_shape, ours.event_shape) == (theirs.batch_shape, theirs.event_shape)
    value = ours.sample(sample)
    assert value.shape == theirs.sample(sample).shape
    torch.testing.assert_close(ours.log_prob(value), theirs.log_prob(value))
    for name in ("mean", "mode", "variance", "stddev"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())


@KINDS
def test_entropies_and_divergences_are_the_expectations_that_they_stand_for(make: Make) -> None:
    (p, _), (q, _) = make(3), make(3)
    value = p.sample((100_000,), key=make_key(5))
    surprisal = -p.log_prob(value)
    torch.testing.assert_close(p.entropy(), surprisal.mean(0), rtol=0, atol=0.05)
    torch.testing.assert_close(kl_divergence(p, q), (-surprisal - q.log_prob(value)).mean(0), rtol=0.05, atol=0.05)


@KINDS
def test_expanded_ones_are_the_same_with_draws_of_their_own(make: Make) -> None:
    ours, theirs = make(4, 1)
    wide, theirs = ours.expand((2, 4, 3)), theirs.expand((2, 4, 3))
    assert type(wide) is type(ours)
    assert (wide.batch_shape, wide.event_shape) == ((2, 4, 3), (K,))
    value = wide.sample((100,))
    assert value.shape == (100, 2, 4, 3, K)
    assert not torch.equal(value[:, 0], value[:, 1])
    torch.testing.assert_close(wide.log_prob(value), theirs.log_prob(value))
    torch.testing.assert_close(wide.entropy(), theirs.entropy())
    torch.testing.assert_close(wide.variance, theirs.variance)


@KINDS
def test_draws_have_mean_and_variance(make: Make) -> None:
    ours, _ = make(3)
    draws = ours.sample((100_000,), key=make_key(3))
    torch.testing.assert_close(draws.mean(0), ours.mean, rtol=0, atol=0.05)
    torch.testing.assert_close(draws.var(0), ours.variance, rtol=0.05, atol=0.01)


@KINDS
def test_a_key_or_a_generator_repeats_a_draw(make: Make) -> None:
    ours, _ = make(3)
    assert torch.equal(ours.sample((2,), key=make_key(1)), ours.sample((2,), key=make_key(1)))
    first, second = (ours.sample((2,), generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(ours.sample((2,)), ours.sample((2,)))


@KINDS
def test_divergences_are_those_of_torch(make: Make) -> None:
    (p, p_theirs), (q, q_theirs) = make(4, 1), make(3)
    expected = kl_divergence(p_theirs.expand((4, 3)), q_theirs.expand((4, 3)))
    torch.testing.assert_close(kl_divergence(p, q), expected)
    torch.testing.assert_close(kl_divergence(p, p), torch.zeros(4, 1, dtype=torch.float64))


def test_the_divergence_from_the_standard_gaussian_is_the_op() -> None:
    ours, _ = gaussian(3)
    zeros = torch.zeros(K, dtype=torch.float64)
    expected = ws.gaussian_kl(ours.mu, ours.logvar)
    torch.testing.assert_close(kl_divergence(ours, DiagonalGaussian(zeros, zeros)), expected)


def test_a_draw_comes_with_its_log_prob() -> None:
    ours, _ = gaussian(3)
    z, log_prob = ours.rsample_log_prob((2,), key=make_key(1))
    assert torch.equal(z, ours.rsample((2,), key=make_key(1)))
    torch.testing.assert_close(log_prob, ours.log_prob(z))


def test_gradients_reach_the_parameters() -> None:
    mu, logvar, logits = torch.randn(3, 2, K, dtype=torch.float64).requires_grad_().unbind()
    value, x = torch.randn(4, 2, K, dtype=torch.float64), torch.randint(2, (2, K)).double()

    def gaussian_terms(mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
        p = DiagonalGaussian(mu, logvar)
        other = DiagonalGaussian(logvar, mu)
        return p.rsample((3,), key=make_key(1)), p.log_prob(value), p.entropy(), kl_divergence(p, other)

    def bernoulli_terms(logits: Tensor) -> tuple[Tensor, ...]:
        p = BernoulliVector(logits)
        return p.log_prob(x), p.entropy(), kl_divergence(p, BernoulliVector(-logits))

    assert torch.autograd.gradcheck(gaussian_terms, (mu, logvar))
    assert torch.autograd.gradcheck(bernoulli_terms, (logits,))
    assert not DiagonalGaussian(mu, logvar).sample().requires_grad
    assert not BernoulliVector(logits).sample().requires_grad


def test_parameters_broadcast_without_being_expanded() -> None:
    mu, logvar = torch.randn(4, 1, K, dtype=torch.float64), torch.randn(3, K, dtype=torch.float64)
    ours, theirs = DiagonalGaussian(mu, logvar), Independent(Normal(mu, (logvar / 2).exp()), 1)
    assert ours.batch_shape == (4, 3)
    assert ours.mu is mu
    value = ours.sample((2,))
    assert value.shape == (2, 4, 3, K)
    torch.testing.assert_close(ours.log_prob(value), theirs.log_prob(value))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    torch.testing.assert_close(ours.mean, theirs.mean)


def test_what_torch_asks_of_a_class() -> None:
    assert DiagonalGaussian.has_rsample
    assert not BernoulliVector.has_rsample
    assert DiagonalGaussian.support is constraints.real_vector
    assert BernoulliVector.support.event_dim == 1  # type: ignore[attr-defined]
    for kind in (DiagonalGaussian, BernoulliVector):
        assert issubclass(kind, Distribution)
        assert set(kind.arg_constraints) <= set(kind.__init__.__annotations__)  # type: ignore[arg-type]
    ours, _ = gaussian(3)
    assert "mu: torch.Size([3, 5])" in repr(ours)


@KINDS
def test_copies_and_pickles_are_the_same(make: Make) -> None:
    ours, _ = make(3)
    value = ours.sample()
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other.log_prob(value), ours.log_prob(value))
        assert other.batch_shape == ours.batch_shape


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiagonalGaussian(torch.zeros(3), torch.tensor([0.0, torch.nan, 0.0])), "parameter logvar"),
        (lambda: BernoulliVector(torch.tensor([0.0, torch.nan])), "parameter logits"),
        (lambda: DiagonalGaussian(torch.zeros(3), torch.tensor(0.0)), "expected logvar to have one dimension at least"),
        (lambda: DiagonalGaussian(torch.zeros(3), torch.zeros(4)), r"to broadcast, got \[\[3\], \[4\]\]"),
        (lambda: BernoulliVector(torch.tensor(0.0)), "one dimension at least, got"),
        (lambda: gaussian(3)[0].log_prob(torch.full((K,), torch.nan)), "within the support"),
        (lambda: bernoulli(3)[0].log_prob(torch.full((K,), 0.5)), "within the support"),
        (lambda: bernoulli(3)[0].log_prob(torch.zeros(K + 1)), "event_shape"),
    ],
)
def test_wrong_arguments_and_values_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiagonalGaussian(torch.zeros(3), 0.0), "expected logvar to be a tensor, got float"),  # type: ignore[arg-type]
        (lambda: BernoulliVector([0.0]), "expected logits to be a tensor, got list"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_tensor_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


def test_validation_can_be_turned_off() -> None:
    grey = torch.full((K,), 0.5)
    ours, _ = bernoulli(3, validate_args=False)
    assert ours.log_prob(grey).shape == (3,)
    assert ours.expand((2, 3)).log_prob(grey).shape == (2, 3)
    with pytest.raises(ValueError, match="within the support"):
        bernoulli(3, validate_args=True)[0].expand((2, 3)).log_prob(grey)


@KINDS
def test_an_empty_batch_is_no_mistake(make: Make) -> None:
    """Where arguments are not validated; torch's own constraints of vectors do not know it."""
    ours, _ = make(0, validate_args=False)
    value = ours.sample((2,))
    assert value.shape == (2, 0, K)
    assert ours.log_prob(value).shape == (2, 0)
    assert ours.entropy().shape == kl_divergence(ours, ours).shape == (0,)


def test_half_types_are_scored_in_float32() -> None:
    a, b = torch.randn(2, 3, 300, dtype=torch.bfloat16)
    for p, q in (
        (DiagonalGaussian(a, b), DiagonalGaussian(b, a)),
        (BernoulliVector(a), BernoulliVector(b)),
    ):
        value = p.sample()
        assert value.dtype == torch.bfloat16
        assert p.log_prob(value).dtype == torch.float32
        precise_p, precise_q = (type(d)(*(getattr(d, name).double() for name in d.arg_constraints)) for d in (p, q))
        torch.testing.assert_close(p.entropy(), precise_p.entropy().float())
        torch.testing.assert_close(kl_divergence(p, q), kl_divergence(precise_p, precise_q).float())
    assert BernoulliVector(a).log_prob(torch.ones(300, dtype=torch.bool)).dtype == torch.float32


@pytest.mark.parametrize("logits", [(8.0, 8.01), (18.0, 16.0), (-12.0, -11.0)])
def test_a_divergence_between_near_certainties_keeps_its_precision(logits: tuple[float, float]) -> None:
    a, b = torch.tensor(logits)[:, None]
    expected = kl_divergence(*(Independent(Bernoulli(logits=logit.double()), 1) for logit in (a, b)))
    divergence = kl_divergence(BernoulliVector(a), BernoulliVector(b))
    torch.testing.assert_close(divergence.double(), expected, rtol=0.02, atol=0)


def test_a_loss_of_distributions_compiles() -> None:
    def loss(mu: Tensor, logvar: Tensor, logits: Tensor, x: Tensor, key: Tensor) -> Tensor:
        q = DiagonalGaussian(mu, logvar, validate_args=False)
        z = q.rsample(key=key)
        return q.log_prob(z).mean() - BernoulliVector(logits + z, validate_args=False).log_prob(x).mean()

    torch.compiler.reset()
    arguments = (*torch.randn(3, 4, K).unbind(), torch.ones(4, K), make_key(2))
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(*arguments), loss(*arguments))
