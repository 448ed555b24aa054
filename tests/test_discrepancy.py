"""Compare the energy distance with its definition, and check the distribution of its p-values."""

import math

import pytest
import torch

from wakesleep_ext.evaluation.discrepancy import energy_distance


def test_the_energy_distance_is_the_mean_over_pairs():
    x, y = torch.randint(2, (7, 5)), torch.randint(2, (4, 5))

    def mean(a, b):
        distances = torch.tensor([math.dist(i, j) for i in a.tolist() for j in b.tolist()])
        pairs = len(a) * (len(b) - 1 if a is b else len(b))
        return distances.sum().item() / pairs

    expected = 2 * mean(x, y) - mean(x, x) - mean(y, y)
    for chunk_rows in (3, 1000):
        assert energy_distance(x, y, chunk_rows=chunk_rows).energy_distance == pytest.approx(expected, abs=1e-5)


def test_the_energy_distance_tells_apart_what_differs_and_nothing_else():
    same, dependent = [], []
    for seed in range(60):
        x, y, z = (torch.rand(count, 10) < 0.5 for count in (20, 30, 300))
        same.append(energy_distance(x, y, 99, seed=seed))
        z[:, 5:] = z[:, :5]  # each pixel's mean is as before
        dependent.append(energy_distance(x.repeat(5, 1), z, 99, seed=seed))
    p = torch.tensor([found.p_value for found in same])
    assert 0.35 < p.mean() < 0.65
    assert (p < 0.1).double().mean() < 0.25
    distances = torch.tensor([found.energy_distance for found in same])
    assert abs(distances.mean()) < 3 * distances.std() / math.sqrt(60)
    assert max(found.p_value for found in dependent) < 0.05


def test_the_energy_distance_refuses_what_has_no_pairs():
    x = torch.ones(3, 5)
    for y in (torch.ones(1, 5), torch.ones(3, 4), torch.ones(5)):
        with pytest.raises(ValueError, match="expected y to have shape"):
            energy_distance(x, y)
