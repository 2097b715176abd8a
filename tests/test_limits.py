"""The two limits of problems 1 and 6: as the spread goes to 0, a step of EM becomes a step of K-means or K-medians."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from mixproof.inference.em import responsibilities
from mixproof.inference.lloyd import MANHATTAN, SQUARED_EUCLIDEAN, Metric, lloyd, update
from mixproof.inference.nearest import assign, deviations
from mixproof.models import laplace
from mixproof.models.gaussian_isotropic import GaussianIsotropic

WEIGHTS = torch.tensor([0.15, 0.6, 0.25], dtype=torch.float64)
LIMITS = pytest.mark.parametrize("metric", [SQUARED_EUCLIDEAN, MANHATTAN], ids=["kmeans", "kmedians"])


def rows(seed: int, num_data: int = 61, num_features: int = 2) -> Tensor:
    return torch.randn(num_data, num_features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def family_at(metric: Metric, spread: float, centers: Tensor, weights: Tensor) -> tuple[Any, Any]:
    """Return the family whose limit the metric is, and its parameters with every component as wide as ``spread``."""
    if metric is SQUARED_EUCLIDEAN:
        family = GaussianIsotropic(variance=spread)
        return family, family.Params(weights, centers)
    return laplace, laplace.Params(weights, centers, torch.full_like(centers, spread))


def em_step(metric: Metric, spread: float, x: Tensor, centers: Tensor, weights: Tensor = WEIGHTS) -> tuple[Tensor, Any]:
    """Return the responsibilities of one step and the parameters it makes."""
    family, params = family_at(metric, spread, centers, weights)
    resp = responsibilities(family, params, x)
    return resp, family.m_step(family.statistics(params, x, resp))


@LIMITS
@pytest.mark.parametrize("seed", range(5))
def test_em_step_becomes_a_lloyd_step(metric: Metric, seed: int) -> None:
    x, centers = rows(seed), rows(seed + 100, 3)
    labels = assign(x, centers, metric.power)
    one_hot = torch.nn.functional.one_hot(labels, 3).double()
    expected = update(x, labels, centers, metric)
    gaps = []
    for exponent in range(1, 7):
        resp, params = em_step(metric, 10.0**-exponent, x, centers)
        gaps.append(((resp - one_hot).abs().max().item(), params))
    errors = [error for error, _ in gaps]
    assert all(late <= early for early, late in itertools.pairwise(errors))
    assert errors[0] > 1e-3
    assert errors[-1] == 0
    limit = gaps[-1][1]
    rounding = 2**6 * torch.finfo(torch.float64).eps * x.abs().max()
    assert (limit.locs - expected).abs().max() <= rounding
    assert torch.allclose(limit.weights, labels.bincount(minlength=3).double() / len(x), rtol=1e-15)


@LIMITS
def test_gap_of_a_row_shrinks_at_the_rate_of_its_margin(metric: Metric) -> None:
    """log of a losing responsibility is log pi_j / pi_k minus the margin of distances over the spread."""
    x, centers = rows(7, 20), rows(8, 3)
    distances = (x[:, None] - centers).abs().pow(metric.power).sum(-1)
    margin = distances - distances.min(1, keepdim=True).values
    spread = 0.05
    scale = 2 * spread if metric is SQUARED_EUCLIDEAN else spread
    resp, _ = em_step(metric, spread, x, centers)
    nearest = distances.argmin(1)
    log_ratio = resp.log() - resp.gather(1, nearest[:, None]).log()
    expected = WEIGHTS.log() - WEIGHTS[nearest].log()[:, None] - margin / scale
    assert torch.allclose(log_ratio, expected, rtol=1e-12, atol=1e-12)


@LIMITS
@pytest.mark.parametrize("seed", range(3))
def test_iterated_em_steps_end_where_lloyd_ends(metric: Metric, seed: int) -> None:
    x, centers = rows(seed + 20), rows(seed, 3)
    expected = lloyd(x, centers, metric)
    weights = WEIGHTS
    for _ in range(len(expected.objective) + 1):
        _, params = em_step(metric, 1e-7, x, centers, weights)
        centers, weights = params.locs, params.weights
    rounding = 2**6 * torch.finfo(torch.float64).eps * x.abs().max()
    assert (centers - expected.centers).abs().max() <= rounding


@LIMITS
def test_tied_rows_split_by_the_weights_for_every_spread(metric: Metric) -> None:
    """A row as far from two centres has the odds of their weights in the limit, where Lloyd takes the first of them."""
    centers = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 9.0]], dtype=torch.float64)
    x = torch.tensor([[0.0, 0.0], [0.0, -2.0], [-1.5, 0.0], [1.25, 0.5], [0.5, 8.0]], dtype=torch.float64)
    split = torch.tensor([0.15, 0.6, 0.0], dtype=torch.float64) / 0.75
    for spread in (1e-3, 1e-5, 1e-8):
        resp, params = em_step(metric, spread, x, centers)
        rounding = (
            4 * torch.finfo(torch.float64).eps * 10 / spread
        )  # of log p(x, z), whose size is distance over spread
        assert torch.allclose(resp[:2], split.expand(2, -1), rtol=rounding, atol=0)
        assert torch.equal(resp[2:], torch.eye(3, dtype=torch.float64))
    assert torch.equal(assign(x, centers, metric.power)[:2], torch.tensor([0, 0]))
    assert torch.allclose(params.weights, (2 * split + 1) / 5, rtol=rounding)
    assert not torch.allclose(params.weights, torch.tensor([3.0, 1.0, 1.0]).double() / 5)
    if metric is SQUARED_EUCLIDEAN:
        expected = (0.2 * (x[0] + x[1]) + x[2]) / 1.4
        assert torch.allclose(params.locs[0], expected, rtol=rounding)


def test_equal_weights_split_a_tie_in_halves() -> None:
    centers = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    x = torch.zeros(1, 1, dtype=torch.float64)
    weights = torch.full((2,), 0.5, dtype=torch.float64)
    for metric in (SQUARED_EUCLIDEAN, MANHATTAN):
        family, params = family_at(metric, 1e-9, centers, weights)
        assert torch.equal(responsibilities(family, params, x), weights[None])


def test_even_clusters_have_an_interval_of_medians() -> None:
    """With an even number of rows the M-step's maximiser is any point between the middle two; ours is the midpoint."""
    x = torch.tensor([[0.0], [1.0], [4.0], [9.0], [100.0]], dtype=torch.float64)
    centers = torch.tensor([[3.0], [90.0]], dtype=torch.float64)
    resp, params = em_step(MANHATTAN, 1e-6, x, centers, torch.tensor([0.9, 0.1], dtype=torch.float64))
    labels = assign(x, centers, MANHATTAN.power)
    assert torch.equal(resp.argmax(1), labels)
    assert torch.equal(params.locs, torch.tensor([[2.5], [100.0]], dtype=torch.float64))
    least = deviations(x, labels, params.locs, MANHATTAN.power).sum()
    for other in (1.0, 2.0, 4.0):
        moved = torch.tensor([[other], [100.0]], dtype=torch.float64)
        assert deviations(x, labels, moved, MANHATTAN.power).sum() == least
    assert deviations(x, labels, torch.tensor([[0.9], [100.0]], dtype=torch.float64), MANHATTAN.power).sum() > least


def test_squared_distance_and_absolute_distance_assign_differently() -> None:
    """The two limits are not one: this row is nearer to the first centre in L2, and to the second in L1."""
    centers = torch.tensor([[2.0, 2.0], [3.2, 0.0]], dtype=torch.float64)
    x = torch.zeros(1, 2, dtype=torch.float64)
    weights = torch.full((2,), 0.5, dtype=torch.float64)
    for metric, winner in ((SQUARED_EUCLIDEAN, 0), (MANHATTAN, 1)):
        family, params = family_at(metric, 1e-4, centers, weights)
        assert responsibilities(family, params, x)[0, winner] == 1
