"""Components that have run into an infinity of the likelihood: said so, at every front door, and never returned."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from mixproof.inference.dataset import Block
from mixproof.inference.em import em, has_collapsed
from mixproof.inference.estimators import GaussianMixture
from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.online_em import online_em
from mixproof.inference.posterior_mode import posterior_mode
from mixproof.inference.restarts import em_restarts
from mixproof.inference.standard_errors import bootstrap, standard_errors
from mixproof.models import gaussian_diagonal, gaussian_full, gaussian_tied
from tests.conftest import seeded


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def split(x: Tensor, num_first: int) -> gaussian_full.Params:
    """Return the start that takes the first rows for one component and the others for the other."""
    parts = x[:num_first], x[num_first:]
    within = torch.stack([torch.cov(part.mT) + 1e-3 * torch.eye(x.shape[1]).double() for part in parts])
    return gaussian_full.Params(
        torch.tensor([0.5, 0.5]).double(), torch.stack([part.mean(0) for part in parts]), within
    )


@pytest.mark.parametrize("size", [2, 4, 7])
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_as_many_distinct_rows_as_features_span_too_little(size: int, times: int, offset: float) -> None:
    """The covariance of D points is singular: its last variance is rounding, and the likelihood unbounded."""
    for seed in range(10):
        few = normal(seed + 100, size, size) + 6
        x = torch.cat([normal(seed, 10 * size, size), few.repeat(times, 1)]) + offset
        for rows in (x, x.flip(0)):
            with pytest.raises(ValueError, match=r"component \d has collapsed at step \d+"):
                em(gaussian_full, rows, split(x, 10 * size), max_steps=5000)


def test_one_row_more_is_enough() -> None:
    for seed in range(10):
        x = torch.cat([normal(seed, 40, 4), normal(seed + 100, 5, 4) + 6])
        fit = em(gaussian_full, x, split(x, 40), max_steps=5000)
        assert fit.converged
        # Exactly: the second component has its five rows alone, to what the first takes of them.
        expected = torch.cov(x[40:].mT, correction=0)
        assert torch.allclose(fit.params.covariances[1], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("dtype", "narrow", "collapsed"),
    [
        (torch.float64, 1e-4, False),
        (torch.float64, 1e-5, False),
        (torch.float64, 1e-6, True),
        (torch.float64, 0.0, True),
        (torch.float32, 2e-2, False),
        (torch.float32, 1e-3, True),
    ],
)
def test_what_a_covariance_can_hold(dtype: torch.dtype, narrow: float, collapsed: bool) -> None:
    """Two features that differ by some share of their spread: their difference is rounding below eps^0.35."""
    common = 3 * normal(0, 500, 1)
    x = common + 3 * narrow * normal(1, 500, 2)
    covariance = 9 * (torch.ones(2, 2).double() + max(narrow, 1e-7) ** 2 * torch.eye(2).double())
    params = gaussian_full.Params(torch.ones(1).double(), torch.zeros(1, 2).double(), covariance[None])
    block = Block(0, x.to(dtype), None)
    single = gaussian_full.Params(*(value.to(dtype) for value in params))
    assert has_collapsed(gaussian_full, single, block) is collapsed
    tied = gaussian_tied.Params(single.weights, single.locs, single.covariances[0])
    assert has_collapsed(gaussian_tied, tied, block) is collapsed


def test_rounding_does_not_win_against_sound_starts() -> None:
    x = torch.cat([normal(0, 40, 4), normal(1, 4, 4) + 6])
    sound = [gaussian_full.init_params(x, 2, seeded(seed), method="random") for seed in range(5)]
    alone = em_restarts(gaussian_full, x, sound)
    found = em_restarts(gaussian_full, x, [*sound, split(x, 40)])
    assert "has collapsed" in found.failures[5]
    assert found.best.log_lik[-1] == alone.best.log_lik[-1]


def test_a_column_of_two_values_is_no_fault_of_the_m_step() -> None:
    """Sex, in a table of ten real columns: a component of one sex has no spread there, and EM runs into it."""
    with pytest.raises(ValueError, match=r"no start survived: component \d has collapsed"):
        GaussianMixture(3, n_init=5, random_state=8).fit(load_diabetes().data[:150, :5])


def test_replicates_that_collapse_are_no_fits() -> None:
    x = torch.cat([normal(0, 25, 3), normal(1, 6, 3) / 2 + 6])
    fit = em(gaussian_full, x, split(x, 25), max_steps=3000).params
    settings: dict[str, Any] = {"num_replicates": 200, "method": "nonparametric"}
    with pytest.warns(ConvergenceWarning, match="lost a component, by its rows or its spread"):
        draws = bootstrap(gaussian_full, x, fit, generator=seeded(1), **settings)
    covariances = draws.params["covariances"][0]
    scales = covariances.diagonal(dim1=-2, dim2=-1).sqrt()
    correlations = covariances / scales[..., None] / scales[..., None, :]
    assert torch.linalg.eigvalsh(correlations).amin() > 1e-8
    drawn = torch.multinomial(torch.ones(200, len(x)).double(), len(x), replacement=True, generator=seeded(1))
    too_few = sum(len(rows[rows >= 25].unique()) <= 3 for rows in drawn)
    assert too_few > 20
    assert draws.attributes["num_failed"] >= too_few


@pytest.mark.parametrize(
    ("family", "few"),
    [
        (gaussian_diagonal, torch.full((5, 1), 6.3).double()),
        pytest.param(gaussian_full, torch.tensor([[6.3, 5.0], [7.0, 4.0]]).double(), marks=pytest.mark.slow),
    ],
)
def test_a_climb_into_an_infinity_finds_no_mode(family: Any, few: Tensor) -> None:
    """Equal rows in one dimension, and as many rows as features in two: the density has no bound, and no maximum."""
    x = torch.cat([normal(0, 30, few.shape[1]), few])
    full = split(x, 30)
    diagonal = gaussian_diagonal.Params(full.weights, full.locs, full.covariances.diagonal(dim1=-2, dim2=-1))
    start = diagonal if family is gaussian_diagonal else full
    with pytest.warns(ConvergenceWarning, match="no mode: the log density still rises along"):
        mode = posterior_mode(partial(family.model, num_components=2), start, x)
    assert not mode.converged


def test_no_standard_errors_at_an_edge() -> None:
    """Beside rounding there is no curvature to be had."""
    x = torch.cat([normal(0, 40, 4), normal(1, 4, 4) + 6])
    fit = split(x, 40)
    singular = fit.covariances - 1e-3 * torch.eye(4).double() * (1 - 1e-12)
    posterior = LogPosterior(partial(gaussian_full.model, num_components=2), x)
    with pytest.raises(ValueError, match="covariances is at the edge of its support"):
        standard_errors(posterior, fit._replace(covariances=singular))


def test_a_reading_that_a_stream_repeats() -> None:
    rng = np.random.default_rng(0)
    x = np.where(rng.random(2000) < 0.4, 123.456, 2 * rng.normal(size=2000) + 1)[:, None]
    start = gaussian_full.Params(
        torch.tensor([0.5, 0.5]).double(),
        torch.tensor([[123.456], [1.0]]).double(),
        torch.tensor([[[0.01]], [[4.0]]]).double(),
    )
    with pytest.raises(ValueError, match="component 0 has collapsed after the last chunk"):
        online_em(gaussian_full, np.array_split(x, 200), start)
