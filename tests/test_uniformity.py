"""The band of an empirical distribution function, against published levels, brute force and simulation."""

import itertools

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize_scalar

from mixproof.inference.verification.uniformity import (
    probability_inside,
    simultaneous_band,
    simultaneous_level,
    uniform,
)

SEED = 5
OPTIMISER_TOLERANCE = np.finfo(float).eps ** 0.25
"""The default of R's ``optimize``, with which the published levels were found."""


def ends(num_values: int, num_points: int, gamma: float) -> tuple[np.ndarray, np.ndarray, int]:
    where = np.arange(1, num_points) / num_points
    lower = stats.binom.ppf(gamma / 2, num_values, where).astype(int)
    return lower, stats.binom.ppf(1 - gamma / 2, num_values, where).astype(int), num_values


@pytest.mark.parametrize(("size", "published"), [(100, 0.00404870), (1000, 0.00152572)])
def test_levels_of_the_published_method(size: int, published: float) -> None:
    """The authors' code minimises the distance to 95 % by Brent's method at a tolerance of 1.2e-4."""
    found = minimize_scalar(
        lambda gamma: abs(probability_inside(*ends(size, size, gamma)) - 0.95),
        bounds=(0, 0.05),
        method="bounded",
        options={"xatol": OPTIMISER_TOLERANCE},
    )
    assert found.x == pytest.approx(published, abs=5e-9)
    assert simultaneous_level(size) == pytest.approx(published, abs=OPTIMISER_TOLERANCE)


def test_level_is_the_largest_that_keeps_the_probability() -> None:
    for size, points in ((7, 4), (100, 100), (250, 40)):
        gamma = simultaneous_level(size, points)
        assert probability_inside(*ends(size, points, gamma * (1 - 1e-6))) >= 0.95
        assert probability_inside(*ends(size, points, gamma * (1 + 1e-6))) < 0.95


def test_probability_against_all_tables_of_counts() -> None:
    lower, upper, num_values = np.array([0, 2, 2]), np.array([3, 4, 6]), 6
    total = 0.0
    for counts in itertools.product(range(num_values + 1), repeat=4):
        below = np.cumsum(counts)
        if below[-1] == num_values and (lower <= below[:3]).all() and (below[:3] <= upper).all():
            total += stats.multinomial.pmf(counts, num_values, [0.25] * 4)
    assert probability_inside(lower, upper, num_values) == pytest.approx(total, rel=1e-12)


def test_probability_against_simulation() -> None:
    where, lower, upper = simultaneous_band(50, 50)
    values = np.random.default_rng(SEED).random((20_000, 50))
    shares = (values[:, :, None] <= where).mean(1)
    inside = ((shares >= lower - 1e-12) & (shares <= upper + 1e-12)).all(1).mean()
    expected = probability_inside(np.rint(lower * 50).astype(int), np.rint(upper * 50).astype(int), 50)
    assert abs(inside - expected) < 5 * (expected * (1 - expected) / 20_000) ** 0.5


def test_uniform_values_pass_and_others_fail() -> None:
    rng = np.random.default_rng(SEED)
    p_values = []
    for _ in range(300):
        check = uniform(rng.random(200).tolist(), num_points=50)
        assert check.p_value is not None
        assert check.passed == (check.p_value > 0.05)
        p_values.append(check.p_value)
    assert stats.kstest(p_values, "uniform", alternative="greater").pvalue > 1e-3
    values = rng.random(2000)
    for fault in (values**1.2, values**0.8, 0.5 + (values - 0.5) * 0.9, np.where(values < 0.01, 0, values)):
        found = uniform(fault.tolist())
        assert not found.passed
        assert found.p_value is not None
        assert found.p_value < 0.05


@pytest.mark.parametrize(("num_values", "num_points"), [(2, 2), (3, 4), (8, 3)])
def test_p_value_is_the_probability_of_tables_as_unlikely(num_values: int, num_points: int) -> None:
    """Over all tables of counts: that of a p-value of at most p is at most p, and is p at every p that occurs."""
    found = []
    for cells in itertools.combinations_with_replacement(range(num_points), num_values):
        counts = np.bincount(cells, minlength=num_points)
        check = uniform([(cell + 0.5) / num_points for cell in cells], num_points=num_points)
        assert check.p_value is not None
        found.append((check.p_value, stats.multinomial.pmf(counts, num_values, [1 / num_points] * num_points)))
    for p_value, _ in found:
        at_most = sum(probability for other, probability in found if other <= p_value + 1e-12)
        assert at_most == pytest.approx(p_value, abs=1e-12)


def test_conservative_values_pass_only_where_asked() -> None:
    values = np.random.default_rng(SEED).random(2000) ** 0.8
    assert not uniform(values.tolist()).passed
    assert uniform(values.tolist(), conservative=True).passed
    assert not uniform((values**2).tolist(), conservative=True).passed


@pytest.mark.parametrize("values", [[], [0.5, 1.5], [-0.1]])
def test_values_outside_the_unit_interval_raise(values: list[float]) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        uniform(values)


def test_wrong_sizes_raise() -> None:
    with pytest.raises(ValueError, match="probability"):
        simultaneous_level(10, probability=1.0)
    with pytest.raises(ValueError, match="two cells"):
        simultaneous_level(10, 1)
