"""How many numbers the data decide, against counts by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from mixproof.inference.effective_dimension import effective_dimension
from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.validation import example_params
from mixproof.models import bernoulli, gaussian_diagonal, gaussian_full, gaussian_spherical, gaussian_sum, laplace
from tests.conftest import Case, randn, seeded


def dimension(case: Case, num_components: Any, num_features: int, num_rows: int = 3, seed: int = 0) -> tuple[int, int]:
    """Return the dimension, and the number of coordinates."""
    x = (randn(num_rows, num_features, generator=seeded(1)) > 0).double()
    params, _ = example_params(case.family, num_components, x)
    posterior = LogPosterior(partial(case.family.model, num_components=num_components), x)
    return effective_dimension(case.family, posterior, params, seed=seed), posterior.size


def by_hand(case: Case, k: int, d: int) -> int:
    """Return the number of free entries of the fields of ``Params``, by what each is."""
    counts = {
        "weights": k - 1,
        "x_weights": k - 1,
        "locs": k * d,
        "x_locs": k * d,
        "scales": k * d,
        "probs": k * d,
        "covariances": k * d * (d + 1) // 2,
        "x_covariances": k * d * (d + 1) // 2,
        "covariance": d * (d + 1) // 2,
        "variances": k if case.name == "gaussian_spherical" else k * d,
    }
    return sum(counts[name] for name in case.free)


def test_every_free_number_is_decided_where_features_are_enough(case: Case) -> None:
    if case.name == "gaussian_sum":
        return
    for k, d in [(1, 2), (3, 2)] if case.has_real_data else [(1, 2), (2, 6)]:
        assert dimension(case, case.num_components(k), d)[0] == by_hand(case, k, d), (k, d)


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize("d", [1, 2])
def test_the_parts_of_a_sum_share_a_location_and_a_covariance(size: tuple[int, int], d: int) -> None:
    found, coordinates = dimension(Case("sum", gaussian_sum), size, d)
    parts = [(k - 1) + k * d + k * d * (d + 1) // 2 for k in size]
    assert coordinates == sum(parts)
    assert found == sum(parts) - d - d * (d + 1) // 2


@pytest.mark.parametrize(("k", "d", "decided"), [(3, 3, 7), (2, 2, 3), (2, 3, 7), (5, 1, 1), (2, 4, 9)])
def test_binary_features_decide_at_most_their_table(k: int, d: int, decided: int) -> None:
    """Of two components three features decide all 7 parameters, and of two features all 2^2 - 1 probabilities."""
    assert dimension(Case("coins", bernoulli), k, d)[0] == decided


@pytest.mark.parametrize(("family", "k", "d"), [(gaussian_diagonal, 12, 1), (laplace, 8, 1), (gaussian_full, 6, 4)])
def test_many_components_are_decided_though_they_overlap(family: Any, k: int, d: int) -> None:
    found, coordinates = dimension(Case("many", family), k, d)
    assert found == coordinates


def test_neither_the_rows_nor_the_seed_enter() -> None:
    case = Case("full", gaussian_full)
    assert {dimension(case, 2, 2, num_rows, seed)[0] for num_rows, seed in [(1, 0), (4, 1), (50, 2)]} == {11}


@pytest.mark.parametrize(
    ("family", "k", "d", "decided"),
    [(gaussian_full, 8, 10, 7 + 80 + 8 * 55), (gaussian_spherical, 10, 3, 49), (gaussian_diagonal, 10, 2, 49)],
)
def test_light_components_count_too(family: Any, k: int, d: int, decided: int) -> None:
    """By seeds of which some drew next to no rows from a component of small weight."""
    for seed in (0, 6) if k * d > 50 else range(20):
        assert dimension(Case("light", family), k, d, seed=seed)[0] == decided, seed
