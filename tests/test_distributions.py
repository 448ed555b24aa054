"""Compare our distributions with torch's, and run torch's own checks of distributions on them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Distribution,
    Independent,
    Laplace,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    Poisson,
    StudentT,
    constraints,
    kl_divergence,
)

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
    """Validate arguments as by default, even if other code in the process has changed the default."""
    monkeypatch.setattr(Distribution, "_validate_args", True)


def assert_same(ours: Tensor, theirs: Tensor, *parameters: Tensor) -> None:
    """Check the values and the gradients of the parameters."""
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn_like(theirs)
    options: dict[str, bool] = {"allow_unused": True, "retain_graph": True}
    for a, b in zip(
        torch.autograd.grad(ours, parameters, weights, **options),
        torch.autograd.grad(theirs, parameters, weights, **options),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


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


@pytest.mark.parametrize(
    ("mu_shape", "logvar_shape"),
    [((6, 4), (1,)), ((6, 4), (6, 1)), ((1,), (6, 4)), ((2, 1, 1), (3, 4)), ((4,), (5, 1)), ((1,), (1,))],
)
def test_one_parameter_for_all_dimensions(mu_shape: tuple[int, ...], logvar_shape: tuple[int, ...]) -> None:
    """Values and gradients equal torch's, whichever parameter is broadcast."""
    mu = torch.randn(mu_shape, dtype=torch.float64, requires_grad=True)
    logvar = torch.randn(logvar_shape, dtype=torch.float64, requires_grad=True)
    ours, theirs = DiagonalGaussian(mu, logvar), Independent(Normal(mu, (logvar / 2).exp()), 1)
    assert (ours.batch_shape, ours.event_shape) == (theirs.batch_shape, theirs.event_shape)
    assert ours.mu.shape[-1:] == ours.logvar.shape[-1:] == ours.event_shape
    value = torch.randn(2, *theirs.batch_shape, *theirs.event_shape, dtype=torch.float64)
    other = Independent(Normal(torch.ones(()).double(), 2.0).expand(theirs.event_shape), 1)
    for a, b in (
        (ours.log_prob(value), theirs.log_prob(value)),
        (ours.entropy(), theirs.entropy()),
        (ours.mean + ours.stddev, theirs.mean + theirs.stddev),
        (kl_divergence(ours, other), kl_divergence(theirs, other.expand(theirs.batch_shape))),
    ):
        assert_same(a, b, mu, logvar)
    z, log_prob = ours.rsample_log_prob((7,), key=make_key(3))
    assert z.shape == (7, *theirs.batch_shape, *theirs.event_shape)
    torch.testing.assert_close(log_prob, theirs.log_prob(z))
    wide = ours.expand((3, *theirs.batch_shape))
    torch.testing.assert_close(wide.entropy(), theirs.entropy().expand(wide.batch_shape))


def test_an_event_is_expanded_as_a_view() -> None:
    mu, logvar = torch.randn(6, 4), torch.randn(1)
    ours = DiagonalGaussian(mu, logvar)
    assert ours.mu is mu
    assert ours.logvar.data_ptr() == logvar.data_ptr()


def test_a_scale_in_place_of_a_logvar() -> None:
    mu, scale = torch.randn(2, 3, 5, dtype=torch.float64), torch.rand(3, 1, dtype=torch.float64) + 0.1
    for parameter in (mu, scale):
        parameter.requires_grad_()
    ours, theirs = DiagonalGaussian(mu, scale=scale), Independent(Normal(mu, scale), 1)
    value = torch.randn(4, 2, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(ours.scale, theirs.stddev)
    torch.testing.assert_close(ours.logvar, 2 * scale.log().expand(3, 5))
    assert_same(ours.log_prob(value), theirs.log_prob(value), mu, scale)
    assert_same(ours.entropy(), theirs.entropy(), mu, scale)
    for other in (copy.deepcopy(DiagonalGaussian(mu.detach(), scale=scale.detach())), ours.expand((4, 2, 3))):
        torch.testing.assert_close(other.log_prob(value), theirs.log_prob(value))


def test_probabilities_in_place_of_logits() -> None:
    probs = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    ours, theirs = BernoulliVector(probs=probs), Independent(Bernoulli(probs=probs), 1)
    value = torch.randint(2, (4, 3, 5)).double()
    torch.testing.assert_close(ours.probs, probs)
    assert_same(ours.log_prob(value), theirs.log_prob(value), probs)
    assert_same(ours.entropy(), theirs.entropy(), probs)
    for other in (pickle.loads(pickle.dumps(BernoulliVector(probs=probs.detach()))), ours.expand((4, 3))):
        torch.testing.assert_close(other.log_prob(value), theirs.log_prob(value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_probabilities_score_as_those_of_torch(dtype: torch.dtype) -> None:
    """Values and gradients are finite for every outcome."""
    probs = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.5]], dtype=dtype, requires_grad=True)
    value = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]], dtype=dtype)
    ours, theirs = BernoulliVector(probs=probs), Independent(Bernoulli(probs=probs), 1)
    assert_same(ours.log_prob(value), theirs.log_prob(value), probs)
    (gradient,) = torch.autograd.grad(ours.log_prob(value).sum(), probs)
    assert gradient.isfinite().all()
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    assert torch.equal(ours.sample((50,), key=make_key(1))[:, :2], probs[:2].detach().expand(50, 2, 2))


KL_SHAPES = [((), ()), ((3,), ()), ((), (3,)), ((4, 1), (3,)), ((2, 3), (2, 3))]


@pytest.mark.parametrize(("ours_batch", "theirs_batch"), KL_SHAPES)
def test_divergences_from_a_gaussian_of_torch(ours_batch: tuple[int, ...], theirs_batch: tuple[int, ...]) -> None:
    mu, logvar = (torch.randn(*ours_batch, K, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loc = torch.randn(*theirs_batch, K, dtype=torch.float64, requires_grad=True)
    scale = (torch.rand(*theirs_batch, K, dtype=torch.float64) + 0.2).requires_grad_()
    batch = torch.broadcast_shapes(ours_batch, theirs_batch)
    ours, theirs = DiagonalGaussian(mu, logvar), Independent(Normal(loc, scale), 1)
    twin, other = Independent(Normal(mu, (logvar / 2).exp()), 1).expand(batch), theirs.expand(batch)
    parameters = (mu, logvar, loc, scale)
    for p in (theirs, other, Independent(theirs, 0)):
        assert_same(kl_divergence(ours, p), kl_divergence(twin, other), *parameters)
        assert_same(kl_divergence(p, ours), kl_divergence(other, twin), *parameters)


@pytest.mark.parametrize(("ours_batch", "theirs_batch"), KL_SHAPES)
@pytest.mark.parametrize("name", ["logits", "probs"])
def test_divergences_from_bernoullis_of_torch(
    ours_batch: tuple[int, ...], theirs_batch: tuple[int, ...], name: str
) -> None:
    logits = torch.randn(*ours_batch, K, dtype=torch.float64, requires_grad=True)
    parameter = torch.rand(*theirs_batch, K, dtype=torch.float64, requires_grad=True)
    batch = torch.broadcast_shapes(ours_batch, theirs_batch)
    ours, theirs = BernoulliVector(logits), Independent(Bernoulli(**{name: parameter}), 1)
    twin, other = Independent(Bernoulli(logits=logits), 1).expand(batch), theirs.expand(batch)
    for p in (theirs, other, Independent(theirs, 0)):
        assert_same(kl_divergence(ours, p), kl_divergence(twin, other), logits, parameter)
        assert_same(kl_divergence(p, ours), kl_divergence(other, twin), logits, parameter)


def test_divergences_from_certain_bernoullis_of_torch() -> None:
    certain = Independent(Bernoulli(probs=torch.tensor([0.0, 1.0])), 1)
    fair, same = BernoulliVector(torch.zeros(2)), BernoulliVector(probs=torch.tensor([0.0, 1.0]))
    opposite = BernoulliVector(probs=torch.tensor([1.0, 0.0]))
    for _ in range(2):
        assert kl_divergence(fair, certain) == kl_divergence(opposite, certain) == torch.inf
        assert kl_divergence(same, certain) == kl_divergence(certain, same) == 0
        assert kl_divergence(certain, fair).item() == pytest.approx(2 * torch.tensor(2.0).log().item(), abs=1e-5)
        certain.log_prob(torch.zeros(2))  # caches the logits, which torch clamps
    # not certain, although the probability of this logit rounds to 0
    nearly = Bernoulli(logits=torch.tensor([-200.0, 200.0]))
    assert nearly.probs.tolist() == [0, 1]
    assert kl_divergence(fair, Independent(nearly, 1)).item() == pytest.approx(200 - 2 * torch.tensor(2.0).log().item())


@pytest.mark.parametrize(("ours_batch", "theirs_batch"), KL_SHAPES)
@pytest.mark.parametrize("kind", [MultivariateNormal, LowRankMultivariateNormal])
def test_divergences_from_a_gaussian_with_covariance(
    ours_batch: tuple[int, ...], theirs_batch: tuple[int, ...], kind: type[Distribution]
) -> None:
    mu, logvar = (torch.randn(*ours_batch, K, dtype=torch.float64, requires_grad=True) for _ in range(2))
    factor = torch.randn(*theirs_batch, K, 2, dtype=torch.float64, requires_grad=True)
    loc, diagonal = torch.randn(K, dtype=torch.float64), torch.full((K,), 0.3, dtype=torch.float64)
    covariance = factor @ factor.mT + diagonal.diag()
    theirs: Distribution = LowRankMultivariateNormal(loc, factor, diagonal)
    if kind is MultivariateNormal:
        theirs = MultivariateNormal(loc, covariance)
    batch = torch.broadcast_shapes(ours_batch, theirs_batch)
    ours = DiagonalGaussian(mu, logvar)
    twin = MultivariateNormal(mu, logvar.exp().diag_embed()).expand(batch)
    full = MultivariateNormal(loc, covariance).expand(batch)
    parameters = (logvar, factor)
    assert_same(kl_divergence(ours, theirs), kl_divergence(twin, full), *parameters)
    assert_same(kl_divergence(theirs, ours), kl_divergence(full, twin), *parameters)


def test_divergences_that_torch_has_for_the_base_of_a_vector() -> None:
    (gaussian_ours, gaussian_theirs), (bernoulli_ours, bernoulli_theirs) = gaussian(3), bernoulli(3)
    laplace = Independent(Laplace(torch.randn(3, K).double(), torch.rand(3, K).double() + 0.5), 1)
    poisson = Independent(Poisson(torch.rand(3, K).double() + 0.5), 1)
    torch.testing.assert_close(kl_divergence(gaussian_ours, laplace), kl_divergence(gaussian_theirs, laplace))
    torch.testing.assert_close(kl_divergence(laplace, gaussian_ours), kl_divergence(laplace, gaussian_theirs))
    torch.testing.assert_close(kl_divergence(bernoulli_ours, poisson), kl_divergence(bernoulli_theirs, poisson))


def test_divergences_from_half_types_of_torch_are_float32() -> None:
    a, b = torch.randn(2, 3, 7, dtype=torch.bfloat16)
    ours, theirs = DiagonalGaussian(a, b), Independent(Normal(b, torch.ones_like(b)), 1)
    twin, precise = DiagonalGaussian(a.double(), b.double()), Independent(Normal(b.double(), 1.0), 1)
    for p, q, p_precise, q_precise in ((ours, theirs, twin, precise), (theirs, ours, precise, twin)):
        torch.testing.assert_close(kl_divergence(p, q), kl_divergence(p_precise, q_precise).float())
    bits, other = BernoulliVector(a), Independent(Bernoulli(logits=b), 1)
    assert kl_divergence(bits, other).dtype == kl_divergence(other, bits).dtype == torch.float32


NUMBERS = [
    (lambda: DiagonalGaussian(torch.zeros(K), torch.zeros(K)), lambda: Normal(torch.zeros(K), 1.0)),
    (lambda: DiagonalGaussian(torch.zeros(K), torch.zeros(K)), lambda: Normal(0.0, 1.0)),
    (lambda: DiagonalGaussian(torch.zeros(K), torch.zeros(K)), lambda: Independent(Normal(torch.zeros(K), 1.0), 0)),
    (lambda: DiagonalGaussian(torch.zeros(K), torch.zeros(K)), lambda: Independent(Normal(torch.zeros(2, K), 1.0), 2)),
    (lambda: BernoulliVector(torch.zeros(K)), lambda: Bernoulli(torch.full((K,), 0.5))),
    (lambda: BernoulliVector(torch.zeros(K)), lambda: Independent(Bernoulli(torch.full((2, K), 0.5)), 2)),
]


@pytest.mark.parametrize(("ours", "theirs"), NUMBERS)
def test_divergences_between_unlike_events_say_what_to_write(
    ours: Callable[[], Distribution], theirs: Callable[[], Distribution]
) -> None:
    message = r"expected distributions with the same event shape, got .*Independent\(distribution, 1\)"
    for p, q in ((ours(), theirs()), (theirs(), ours())):
        with pytest.raises(NotImplementedError, match=message):
            kl_divergence(p, q)


@pytest.mark.parametrize("size", [1, K + 1])
def test_divergences_between_events_of_other_sizes_are_refused(size: int) -> None:
    """An event of size 1 would broadcast, and give a wrong number."""
    zeros, wide = torch.zeros(K), torch.zeros(size)
    gaussians = [Independent(Normal(wide, 1.0), 1), MultivariateNormal(wide, torch.eye(size))]
    for ours, theirs in (
        *((DiagonalGaussian(zeros, zeros), other) for other in (DiagonalGaussian(wide, wide), *gaussians)),
        *((BernoulliVector(zeros), o) for o in (BernoulliVector(wide), Independent(Bernoulli(logits=wide), 1))),
    ):
        for p, q in ((ours, theirs), (theirs, ours)):
            with pytest.raises(ValueError, match=r"kl_divergence: expected distributions with the same event shape"):
                kl_divergence(p, q)


def test_divergences_that_nobody_has_are_not_implemented() -> None:
    """Pyro then samples these divergences."""
    student = Independent(StudentT(torch.full((K,), 3.0)), 1)
    for p, q in ((gaussian()[0], student), (student, gaussian()[0]), (bernoulli()[0], student)):
        with pytest.raises(NotImplementedError, match="No KL"):
            kl_divergence(p, q)


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
        (lambda: DiagonalGaussian(torch.zeros(3), torch.tensor(0.0)), "expected logvar to have at least one dimension"),
        (lambda: DiagonalGaussian(torch.zeros(3), torch.zeros(4)), r"to broadcast, got \[\[3\], \[4\]\]"),
        (lambda: BernoulliVector(torch.tensor(0.0)), "at least one dimension, got"),
        (lambda: DiagonalGaussian(torch.zeros(3)), "DiagonalGaussian: expected either logvar or scale, got neither"),
        (lambda: DiagonalGaussian(*torch.zeros(2, 3), scale=torch.ones(3)), "either logvar or scale, got both"),
        (lambda: DiagonalGaussian(torch.zeros(3), scale=torch.tensor([1.0, 0.0, 1.0])), "parameter scale to satisfy"),
        (lambda: DiagonalGaussian(torch.zeros(3), scale=torch.tensor([-1.0])), "parameter scale to satisfy"),
        (lambda: DiagonalGaussian(torch.zeros(3), scale=torch.tensor([torch.nan])), "parameter scale to satisfy"),
        (
            lambda: DiagonalGaussian(torch.zeros(3), scale=torch.ones(4)),
            r"mu and scale to broadcast, got \[\[3\], \[4\]\]",
        ),
        (lambda: BernoulliVector(), "BernoulliVector: expected either logits or probs, got neither"),
        (lambda: BernoulliVector(torch.zeros(3), probs=torch.zeros(3)), "either logits or probs, got both"),
        (lambda: BernoulliVector(probs=torch.tensor([0.5, 1.5])), "parameter probs to satisfy"),
        (lambda: BernoulliVector(probs=torch.tensor([0.5, torch.nan])), "parameter probs to satisfy"),
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
        (lambda: DiagonalGaussian(torch.zeros(3), scale=1.0), "expected scale to be a tensor, got float"),  # type: ignore[arg-type]
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
    assert DiagonalGaussian(torch.zeros(2), scale=-torch.ones(2), validate_args=False).logvar.isnan().all()
    with pytest.raises(ValueError, match="within the support"):
        bernoulli(3, validate_args=True)[0].expand((2, 3)).log_prob(grey)


@KINDS
def test_an_empty_batch_is_no_mistake(make: Make) -> None:
    """Arguments are not validated here, because torch's own vector constraints fail for an empty batch."""
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


def test_a_divergence_from_a_distribution_of_torch_compiles() -> None:
    def divergence(mu: Tensor, scale: Tensor, logits: Tensor, probs: Tensor) -> Tensor:
        q = DiagonalGaussian(mu, scale=scale, validate_args=False)
        p = Independent(Normal(-mu, 2 * scale, validate_args=False), 1, validate_args=False)
        x = BernoulliVector(logits, validate_args=False)
        y = Independent(Bernoulli(probs=probs, validate_args=False), 1, validate_args=False)
        return kl_divergence(q, p) + kl_divergence(p, q) + kl_divergence(x, y) + kl_divergence(y, x)

    torch.compiler.reset()
    arguments = (torch.randn(4, K), torch.rand(4, K) + 0.5, torch.randn(4, K), torch.rand(4, K))
    compiled = torch.compile(divergence, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), divergence(*arguments))
