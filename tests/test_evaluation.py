"""Compare evaluations with sums over all latent variables and with formulas, and check their memory."""

import itertools
import json
import math

import pytest
import torch
from exact import every_binary, is_discrete, log_likelihood, prior_nodes, random_machine, recognition_nodes
from matplotlib.image import imread

from wakesleep_ext import ops
from wakesleep_ext.evaluation.bounds import activities, evaluate, independent_bernoulli_nll, log_likelihood_bounds
from wakesleep_ext.evaluation.importance import ImportanceWeights, WeightedDraws, gathered, weighted_draws
from wakesleep_ext.helmholtz.conditionals import GaussianConditional
from wakesleep_ext.helmholtz.models import RecognitionNetwork
from wakesleep_ext.random import make_key
from wakesleep_ext.report import plots

EVERY_IMAGE = every_binary(3).byte()
MACHINES = {
    "gaussian": ((1,), "gaussian"),
    "two gaussian layers": ((1, 1), "gaussian"),
    "bernoulli": ((3,), "bernoulli"),
    "two bernoulli layers": ((3, 2), "bernoulli"),
}


@pytest.fixture
def machine():
    return random_machine((1,)).float()


@pytest.fixture(params=MACHINES)
def any_machine(request):
    return random_machine(*MACHINES[request.param])


def networks(machine):
    return machine.recognition, machine.generative


def test_more_samples_close_the_gap_between_elbo_and_log_likelihood(machine):
    one, few, many = (
        log_likelihood_bounds(*networks(machine), EVERY_IMAGE.repeat(400, 1), samples)
        .log_likelihood.view(400, 8)
        .mean(0)
        for samples in (1, 5, 1000)
    )
    exact = log_likelihood(machine.double(), EVERY_IMAGE)
    assert (one < few).all()
    assert (few < many).all()
    torch.testing.assert_close(many, exact, rtol=0, atol=0.01)
    assert exact.exp().sum().item() == pytest.approx(1)


@torch.no_grad()
def test_bounds_and_divergences_are_those_of_the_sums_over_all_latent_variables(any_machine):
    recognition, generative = networks(any_machine)
    x, exact = EVERY_IMAGE, log_likelihood(any_machine, EVERY_IMAGE)
    found = log_likelihood_bounds(recognition, generative, x, 40_000, chunk_rows=40_000)

    latents, log_weights = recognition_nodes(any_machine, x)
    q = log_weights.exp()
    of_x, *of_p = [factor.log_prob() for factor in generative.factors(latents, x)]
    of_q = [factor.log_prob() for factor in recognition.factors(latents, x)]
    log_w = generative.log_prob(latents, x) - recognition.log_prob(latents, x)
    assert_near(found.log_likelihood, exact)
    assert_mean(found.reconstruction, q, of_x)
    for kl, log_q, log_p in zip(found.kl.unbind(-1), of_q, of_p, strict=True):
        assert_mean(kl, q, log_q - log_p)
    assert_mean(found.elbo, q, log_w)
    assert_mean(found.reverse_kl, q, exact - log_w)

    latents, log_weights = prior_nodes(any_machine)
    log_ratio = generative.log_prob(latents, x) - recognition.log_prob(latents, x) - exact
    posterior = (generative[0](latents[0]).log_prob(x) + log_weights - exact).exp()
    assert_near(found.forward_kl, (posterior * log_ratio).sum(0))
    assert (found.reverse_kl > 0).all()
    assert (found.forward_kl > 0).all()
    if is_discrete(any_machine):  # of Gaussian ones the mean of w^2 may be infinite
        share = 1 / (posterior * log_ratio.exp()).sum(0)  # 1 / E[p(z|x) / q(z|x)] under the posterior
        torch.testing.assert_close(found.effective_sample_size / 40_000, share, rtol=0.05, atol=0.01)


def assert_mean(actual, probabilities, values, samples=40_000):
    """Check that a mean is within five standard errors of its expectation."""
    mean = (probabilities * values).sum(0)
    variance = (probabilities * (values - mean).square()).sum(0)
    assert ((actual - mean).abs() < 5 * (variance / samples).sqrt() + 1e-6).all()


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0.03, atol=0.03)


def test_bound_and_elbo_part_with_the_second_sample(any_machine):
    one = log_likelihood_bounds(*networks(any_machine), EVERY_IMAGE, 1)
    torch.testing.assert_close(one.elbo, one.log_likelihood)
    assert one.effective_sample_size.eq(1).all()
    assert one.forward_kl.eq(0).all()
    more = log_likelihood_bounds(*networks(any_machine), EVERY_IMAGE, 50)
    assert (more.elbo < more.log_likelihood).all()


@pytest.mark.parametrize("chunk_rows", [4, 35], ids=["samples in three", "images in three"])
def test_chunks_add_up_to_the_formula(machine, chunk_rows):
    """Compares with log-sum-exp over all samples at once."""
    x = EVERY_IMAGE
    offset = itertools.count()
    log_w = torch.zeros(10, 8, dtype=torch.float64)
    for images in torch.arange(8).split(max(1, chunk_rows // 10)):
        mu, logvar = machine.recognition[0].network(x[images]).chunk(2, -1)
        for samples in torch.arange(10).split(chunk_rows):
            key = make_key(3, next(offset))
            z = ops.gaussian_rsample(mu, logvar, (len(samples),), key=key)
            q = torch.distributions.Normal(mu, (logvar / 2).exp())
            prior = torch.distributions.Normal(0.0, 1.0)
            pixels = torch.distributions.Bernoulli(logits=machine.generative[0].network(z))
            log_w[samples[:, None], images] = (
                (prior.log_prob(z) - q.log_prob(z)).sum(-1) + pixels.log_prob(x[images].float()).sum(-1)
            ).double()
    bounds = log_likelihood_bounds(*networks(machine), x, 10, seed=3, chunk_rows=chunk_rows)
    torch.testing.assert_close(bounds.elbo, log_w.mean(0), rtol=1e-5, atol=1e-6)
    expected = log_w.logsumexp(0) - math.log(10)
    torch.testing.assert_close(bounds.log_likelihood, expected, rtol=1e-5, atol=1e-6)
    weights = log_w.softmax(0)
    torch.testing.assert_close(bounds.effective_sample_size, 1 / weights.square().sum(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bounds.forward_kl, (weights * log_w).sum(0) - expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("chunk_rows", "sizes"), [(2, [1, 1, 1]), (11, [2, 1])], ids=["samples", "observations"])
def test_equal_draws_are_found_across_chunks(chunk_rows, sizes):
    """The first observation always draws 0, the second another number each time, the third another in each chunk."""
    calls = itertools.count(1)

    def draw(x, num_samples):
        call, number = next(calls), torch.arange(num_samples)
        z = torch.stack((0 * number, 100 * call + number, 0 * number + call), 1)[:, x]
        return WeightedDraws([torch.zeros(num_samples, len(x), 1), z[..., None]], torch.stack((z, -2 * z)).double())

    groups = [(len(x), *gathered(chunks)) for x, chunks in weighted_draws(draw, torch.arange(3), 5, chunk_rows)]
    observations, log_w, equal = zip(*groups, strict=True)
    assert list(observations) == sizes
    assert [of.shape[0] for of in log_w] == [5] * len(sizes)
    assert torch.cat(equal).tolist() == [True, False, chunk_rows > 5]
    assert torch.cat(log_w, 1)[:, 0].eq(0).all()
    assert torch.cat(log_w, 1)[:, 1].diff().lt(0).all()


def test_weights_too_small_for_a_float_are_averaged_all_the_same(machine):
    with torch.no_grad():
        machine.generative[0].network.head.bias.fill_(-1e5)
    bounds = log_likelihood_bounds(*networks(machine), EVERY_IMAGE[-1:], 100)
    assert bounds.log_likelihood.item() == pytest.approx(-3e5, rel=1e-3)
    assert 1 <= bounds.effective_sample_size.item() <= 100


@pytest.mark.parametrize("descending", [False, True])
def test_weights_far_apart_are_summed_in_any_order(descending):
    log_w = torch.tensor([-torch.inf, -5000.0, -1000.0, -999.0, 3000.0], dtype=torch.float64)
    weights = ImportanceWeights(1)
    for log_weight in log_w.sort(descending=descending).values:
        weights.add(log_weight.view(1, 1))
    assert weights.log_mean.item() == pytest.approx(3000 - math.log(5))
    assert weights.effective_sample_size.item() == pytest.approx(1)
    assert weights.divergence.item() == pytest.approx(math.log(5))
    assert weights.standard_error.item() == pytest.approx(1)


def test_the_standard_error_is_that_of_a_mean_over_the_mean():
    log_w = torch.randn(50, 3, dtype=torch.float64)
    weights = ImportanceWeights(3)
    for part in log_w.split(7):
        weights.add(part)
    w = log_w.exp()
    torch.testing.assert_close(weights.standard_error, w.std(0) / math.sqrt(50) / w.mean(0))


def test_memory_is_bounded_by_the_chunks(machine):
    rows, finished = [], []
    machine.generative[0].register_forward_pre_hook(lambda _, args: rows.append(args[0][..., 0].numel()))
    x = EVERY_IMAGE.repeat(6, 1)
    log_likelihood_bounds(*networks(machine), x, 50, chunk_rows=520, on_images=finished.append)
    assert max(rows) == 500
    assert sum(rows) == 48 * 50
    assert finished == [10, 10, 10, 10, 8]
    rows.clear()
    log_likelihood_bounds(*networks(machine), x[:2], 50, chunk_rows=20)
    assert rows == [20, 20, 10] * 2


def test_results_are_double_and_a_function_of_the_seed(machine):
    first, second, other = (log_likelihood_bounds(*networks(machine), EVERY_IMAGE, 3, seed=seed) for seed in (1, 1, 2))
    assert first.elbo.dtype == first.log_likelihood.dtype == torch.float64
    assert torch.equal(first.log_likelihood, second.log_likelihood)
    assert not torch.equal(first.log_likelihood, other.log_likelihood)


@pytest.mark.parametrize("name", ["num_samples", "chunk_rows"])
def test_counts_below_one_are_refused(machine, name):
    counts = {"num_samples": 1, name: 0}
    with pytest.raises(ValueError, match=f"expected {name} >= 1, got 0"):
        log_likelihood_bounds(*networks(machine), EVERY_IMAGE, **counts)


@torch.no_grad()
def test_activities_are_variances_of_exact_posterior_means(any_machine):
    x = EVERY_IMAGE.repeat(500, 1)
    latents, log_weights = recognition_nodes(any_machine, EVERY_IMAGE)
    found = activities(any_machine.recognition, x, 4, chunk_rows=1000)
    for activity, z in zip(found, latents, strict=True):
        means = (log_weights.exp().unsqueeze(-1) * z).sum(0).repeat(500, 1)
        torch.testing.assert_close(activity, means.var(0), rtol=0.1, atol=0.003)


def test_a_variable_that_nothing_depends_on_is_not_active():
    """Its mean varies from image to image only because of noise from the layer below."""
    first = torch.nn.Linear(3, 2, dtype=torch.float64)
    with torch.no_grad():
        first.weight.zero_()
        second = torch.nn.Linear(1, 2, dtype=torch.float64)
        second.weight.fill_(1.0)
    recognition = RecognitionNetwork([GaussianConditional(first), GaussianConditional(second)])
    below, above = activities(recognition, EVERY_IMAGE.repeat(5000, 1).double(), 2)
    assert below.item() == pytest.approx(0, abs=1e-12)
    variance = first.bias[1].exp().item()  # of the mean, from draw to draw
    assert abs(above.item()) < 0.05 * variance


def test_activities_want_a_variance():
    with pytest.raises(ValueError, match="expected at least two images and two samples, got 1 and 20"):
        activities(random_machine((2,)).recognition, EVERY_IMAGE[:1])


@pytest.fixture(scope="module")
def evaluation():
    return evaluate(
        random_machine((2, 1)), EVERY_IMAGE.repeat(20, 1), 100, 2000, annealed_images=8, chains=5, temperatures=10
    )


def test_dreams_know_the_divergence_from_their_posterior():
    """The z of a dream is known, so the mean needs no weights. Compares with the sum over all z."""
    machine = random_machine((3, 2), "bernoulli")
    found = evaluate(machine, EVERY_IMAGE, 300, dreams := 4000)
    exact = log_likelihood(machine, EVERY_IMAGE)
    bounds = log_likelihood_bounds(*networks(machine), EVERY_IMAGE, 20_000)
    error = (found.sleep_forward_kl.std() / math.sqrt(dreams)).item()
    expected = (exact.exp() * bounds.forward_kl).sum().item()
    assert found.sleep_forward_kl.mean().item() == pytest.approx(expected, abs=4 * error + 0.01)
    expected = (exact.exp() * bounds.reverse_kl).sum().item()
    assert found.sleep.reverse_kl.mean().item() == pytest.approx(expected, abs=0.05)


def test_the_bounds_of_an_evaluation_are_those_of_the_seed(evaluation):
    machine = random_machine((2, 1))
    bounds = log_likelihood_bounds(*networks(machine), EVERY_IMAGE.repeat(20, 1), 100)
    assert torch.equal(evaluation.wake.log_likelihood, bounds.log_likelihood)


def test_the_summary_is_json_and_adds_up(evaluation):
    summary = json.loads(json.dumps(evaluation.summary(), allow_nan=False))
    assert summary["elbo"] == pytest.approx(summary["reconstruction"] - sum(summary["kl"]))
    assert summary["nll"] + summary["elbo"] == pytest.approx(-summary["posterior_kl"]["wake"]["reverse"])
    assert (len(summary["kl"]), summary["units"], len(summary["active_units"])) == (2, [2, 1], 2)
    assert summary["ais"]["images"] == 8
    exact = -log_likelihood(random_machine((2, 1)), EVERY_IMAGE).mean().item()
    assert summary["ais"]["nll"] == pytest.approx(exact, abs=4 * summary["ais"]["standard_error"])
    assert summary["ais"]["bound_nll"] == pytest.approx(-evaluation.wake.log_likelihood[:8].mean().item())
    assert (summary["images"], summary["dreams"], summary["bound_samples"]) == (160, 2000, 100)


def test_an_evaluation_is_drawn(evaluation, tmp_path):
    plots.evaluation(tmp_path / "evaluation.png", evaluation)
    assert (imread(tmp_path / "evaluation.png")[..., :3] < 0.5).any()


def test_the_baseline_scores_each_pixel_by_its_training_mean():
    mean = torch.tensor([0.25, 0.5, 0.9], dtype=torch.float64)
    x = torch.tensor([[1, 0, 1], [0, 0, 0]], dtype=torch.uint8)
    expected = -math.log(0.25 * 0.5 * 0.9) - math.log(0.75 * 0.5 * 0.1)
    assert independent_bernoulli_nll(mean, x) == pytest.approx(expected / 2)


def test_the_baseline_holds_no_pixel_impossible():
    nll = independent_bernoulli_nll(torch.zeros(1), torch.ones(1, 1))
    assert nll == pytest.approx(-math.log(0.001), rel=1e-4)
