"""Check keys and draws: the published values of Philox, equal draws on every computer, and the right distributions."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import KEY_SEED, make_key
from scipy import stats

import wakesleep_ext as ws
from wakesleep_ext import random

# Known-answer vectors of Philox4x32-10, published with Random123 (kat_vectors): counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    as_tensors = [torch.tensor(word) for word in (*counter, *key)]
    assert tuple(int(word) for word in random.philox(*as_tensors)) == words


@pytest.mark.parametrize("offset", [12, 2**60 - 1])
def test_uniforms_of_the_kernels_are_philox(offset: int, device: str) -> None:
    """The random words match bit for bit: a Bernoulli draw is 1 exactly if the uniform is at most p."""
    key = random.make_key(KEY_SEED, offset, device)
    u = random.uniforms(key, (1001,), torch.float64)
    assert u.min() > 0
    assert u.max() <= 1
    # a probability on either side of each uniform, near enough to tell all 32 bits of its word and some of the next
    below, above = torch.logit(u * (1 - 1e-12)), torch.logit(u * (1 + 1e-12))
    assert not ws.bernoulli_sample(below, key=key).any()
    assert ws.bernoulli_sample(above, key=key).all()
    assert (random.uniforms(key, (1001,)).double() - u).abs().max() < 2**-24


@pytest.mark.parametrize("offset", [0, 5, 2**31 - 1])
def test_no_block_is_one_of_torch(offset: int) -> None:
    """On CUDA, thread t of torch draws block j from the counter (j, t) of two 64-bit words, under the same seed."""
    seed = 7
    u = random.uniforms(random.make_key(seed, offset), (400,), torch.float64)
    ours = (u.view(-1, 4) * 2**32).long()
    theirs = random.philox(torch.arange(100), *map(torch.tensor, (0, offset, 0, seed, 0)))
    assert not (ours == torch.stack(torch.broadcast_tensors(*theirs), dim=-1)).all(dim=-1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_normals_of_the_kernels(dtype: torch.dtype, device: str) -> None:
    """Compares with the same words through float64 functions, to a few ulp of the larger value of each pair."""
    key = make_key(device)
    zeros = torch.zeros(100_003, dtype=dtype, device=device)
    got = ws.gaussian_rsample(zeros, zeros, key=key)
    expected = random.standard_normals(key, zeros.shape, torch.float64)
    if dtype == torch.float32:  # the float64 draw refines the float32 one
        expected = random.standard_normals(key, zeros.shape, torch.float32).double()
    error = (got.double() - expected).abs() / torch.finfo(dtype).eps
    assert error.max() < (8 if dtype == torch.float32 else 32)  # the float64 angle of the reference is rounded too


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_normals_of_half_types(dtype: torch.dtype, device: str) -> None:
    """Apart from the rounding of the result, the error is that of ApproximateNormals in csrc/kernels/philox.h."""
    key = make_key(device)
    zeros = torch.zeros(100_000, dtype=dtype, device=device)
    got = ws.gaussian_rsample(zeros, zeros, key=key).double()
    expected = random.standard_normals(key, zeros.shape).double()
    radius = expected.view(-1, 2).norm(dim=1).repeat_interleave(2)
    approximation = 2**-17 * expected.abs() + 2**-19.5 * radius
    largest = expected.abs() + approximation
    rounding = torch.finfo(dtype).eps / 2 * largest + (2**-25 if dtype == torch.float16 else 0)  # of a subnormal
    assert ((got - expected).abs() <= approximation + rounding).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [8, 50, 51, 130])
def test_draws_do_not_depend_on_where_rows_lie(width: int, dtype: torch.dtype, device: str) -> None:
    """Rows are read in words of several sizes, or as one long row."""
    rows, key = 5, make_key(device)
    wide = torch.randn(rows, width + 12, device=device).to(dtype)
    expected = None
    for first, gap in ((0, 0), (1, 0), (2, 0), (4, 0), (8, 0), (0, 1), (0, 2), (1, 11), (2, 2)):
        flat = torch.zeros(first + rows * (width + gap), dtype=dtype, device=device)
        values = flat[first:].view(rows, width + gap)[:, :width]
        values.copy_(wide[:, :width])
        upstream = torch.linspace(-1, 1, rows * width, device=device).to(dtype).view(rows, width)
        mu, logvar = values.detach().requires_grad_(), values.detach().requires_grad_()
        z, log_prob = ws.gaussian_rsample_log_prob(mu, logvar, key=key)
        several = ws.gaussian_rsample(values, values, (3,), key=key)
        made = (
            z.detach(),
            *torch.autograd.grad(z, (mu, logvar), upstream),
            ws.gaussian_rsample(values, values, key=key),
            several,
            ws.bernoulli_sample(values, key=key),
            ws.bernoulli_sample(values, (3,), key=key, dtype=torch.uint8),
        )
        assert torch.equal(made[0], made[3])
        assert torch.equal(made[0], several[0])
        expected = (*made, log_prob.detach()) if expected is None else expected
        for value, same in zip(made, expected[:-1], strict=True):
            assert torch.equal(value, same)
        torch.testing.assert_close(log_prob.detach(), expected[-1])  # the order of the sum depends on the words


def test_a_draw_in_float64_refines_that_in_float32(device: str) -> None:
    key = make_key(device)
    zeros = torch.zeros(10_000, device=device)
    single = ws.gaussian_rsample(zeros, zeros, key=key)
    double = ws.gaussian_rsample(zeros.double(), zeros.double(), key=key)
    assert (single.double() - double).abs().max() < 1e-4  # where the radius is steep in the uniform
    assert (single.double() - double).abs().median() < 1e-7


def test_draws_are_functions_of_their_key(device: str) -> None:
    logits, zeros = torch.zeros(1000, device=device), torch.zeros(1000, device=device)
    for draw in (
        lambda key: ws.bernoulli_sample(logits, key=key),
        lambda key: ws.gaussian_rsample(zeros, zeros, key=key),
    ):
        assert torch.equal(draw(random.make_key(1, 0, device)), draw(random.make_key(1, 0, device)))
        assert not torch.equal(draw(random.make_key(1, 0, device)), draw(random.make_key(2, 0, device)))
        assert not torch.equal(draw(random.make_key(1, 0, device)), draw(random.make_key(1, 1, device)))


def test_the_generator_governs(device: str) -> None:
    zeros = torch.zeros(100, device=device)
    torch.manual_seed(3)
    first, second = ws.gaussian_rsample(zeros, zeros), ws.gaussian_rsample(zeros, zeros)
    torch.manual_seed(3)
    again = ws.gaussian_rsample(zeros, zeros)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    generator = torch.Generator(device).manual_seed(3)
    assert torch.equal(ws.gaussian_rsample(zeros, zeros, generator=generator), first)


def test_a_draw_advances_the_generator_alike_whatever_its_size(device: str) -> None:
    following = []
    for size in (1, 100_000):
        torch.manual_seed(5)
        ws.gaussian_rsample(torch.zeros(size, device=device), torch.zeros(size, device=device))
        following.append(random.draw_key(device))
    assert torch.equal(*following)


def test_log_prob_and_sample_share_their_noise(device: str) -> None:
    mu, logvar = torch.randn(2, 6, 33, device=device)
    key = make_key(device)
    z = ws.gaussian_rsample(mu, logvar, (4,), key=key)
    z_too, log_prob = ws.gaussian_rsample_log_prob(mu, logvar, (4,), key=key)
    assert torch.equal(z, z_too)
    torch.testing.assert_close(log_prob, ws.gaussian_log_prob(mu, logvar, z), rtol=1e-5, atol=1e-4)


_DRAW = """
import hashlib, itertools, torch, wakesleep_ext as ws
key = ws.random.make_key(11, 5)
for threads, dtype in itertools.product((1, 2), (torch.float32, torch.float64, torch.bfloat16, torch.float16)):
    torch.set_num_threads(threads)
    mu = ((torch.arange(40 * 785).double() - 15700) / 5000).reshape(40, 785).to(dtype)
    for t in (
        *ws.gaussian_rsample_log_prob(mu, mu.flip(0), (3,), key=key),
        ws.bernoulli_sample(mu, (3,), key=key),
        ws.bernoulli_log_prob(mu, mu > 0),
        ws.gaussian_kl(mu, mu.flip(0)),
        ws.gaussian_log_prob(mu, mu.flip(0), mu.flip(1)),
    ):
        digest = hashlib.sha256(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        print(dtype, digest)
"""


def test_every_instruction_set_and_thread_count_gives_the_same_bits() -> None:
    """Tests draws and log-probabilities with every instruction set of this processor."""
    known, best = ["DEFAULT", "AVX2", "AVX512"], torch.backends.cpu.get_cpu_capability()
    outputs = []
    for capability in known[: known.index(best) + 1] if best in known else known[:1]:
        done = subprocess.run(
            [sys.executable, "-c", _DRAW],
            env={**os.environ, "ATEN_CPU_CAPABILITY": capability.lower()},
            capture_output=True,
            text=True,
            check=True,
        )
        lines = done.stdout.splitlines()
        assert len(lines) == 2 * 4 * 6
        outputs += [lines[:24], lines[24:]]  # of one thread, and of two
    assert all(output == outputs[0] for output in outputs)


COUNT = 10_000_000


@pytest.mark.parametrize("key", [make_key(), random.make_key(0)], ids=["key", "zero"])
def test_normal_distribution(key: torch.Tensor) -> None:
    zeros = torch.zeros(COUNT)
    z = ws.gaussian_rsample(zeros, zeros, key=key).double().numpy()
    n = np.sqrt(COUNT)
    assert abs(z.mean()) * n < 4
    assert abs(z.var() - 1) * n / np.sqrt(2) < 4
    assert abs((z**3).mean()) * n / np.sqrt(15) < 4
    assert abs((z**4).mean() - 3) * n / np.sqrt(96) < 4
    assert stats.kstest(z[:1_000_000], "norm").pvalue > 1e-3
    # neighbours, pairs of one block, and the two blocks of a vector are uncorrelated, and so are their squares
    for lag in (1, 2, 3, 4, 64):
        assert abs((z[:-lag] * z[lag:]).mean()) * n < 4
        assert abs(((z[:-lag] ** 2 - 1) * (z[lag:] ** 2 - 1)).mean()) * n / 2 < 4
    assert 4.9 < np.abs(z).max() < 6.8  # the tails are there: 32 bits reach to 6.7


def test_uniform_distribution_through_bernoulli() -> None:
    for p in (1e-3, 0.1, 0.5, 0.9, 0.999):
        logits = torch.full((COUNT // 10,), p).logit()
        ones = ws.bernoulli_sample(logits, key=make_key()).sum().item()
        assert stats.binomtest(int(ones), COUNT // 10, p).pvalue > 1e-3


def test_streams_and_offsets_are_uncorrelated() -> None:
    zeros = torch.zeros(1_000_000)
    draws = [ws.gaussian_rsample(zeros, zeros, key=random.make_key(9, offset)) for offset in (0, 1, 2, 4, 2**32)]
    draws.append(ws.gaussian_rsample(zeros, zeros, key=random.make_key(10, 0)))
    correlations = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert correlations.abs().max() * 1000 < 4.5
    words = random.philox_words(make_key(), 100_000, stream=1), random.philox_words(make_key(), 100_000, stream=2)
    assert stats.pearsonr(words[0].numpy(), words[1].numpy()).pvalue > 1e-3
    counts = np.bincount((words[0] >> 24).numpy(), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_extreme_logits_are_certain(device: str) -> None:
    infinity = torch.full((10_000,), torch.inf, device=device)
    assert ws.bernoulli_sample(infinity).all()
    assert not ws.bernoulli_sample(-infinity).any()


def test_make_key() -> None:
    assert random.make_key(2**64 - 1, 3).tolist() == [-1, 3]
    assert random.make_key(-1, 3).tolist() == [-1, 3]
    assert random.draw_key("cpu").shape == (2,)
    with pytest.raises(ValueError, match=r"make_key: expected offset in \[0, 2\*\*60\), got -1"):
        random.make_key(1, -1)
