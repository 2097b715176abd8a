"""What draws say of their own run, on draws of which it is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import xarray

from mixproof.inference.diagnostics import Diagnosis, complaints, diagnose

LIMITS: Any = {"max_rhat": 1.01, "min_effective_draws": 400, "remedy": "draw more", "empty": "take fewer"}


def quantities(values: Any, name: str = "lp") -> xarray.Dataset:
    return xarray.Dataset({name: (("chain", "draw"), np.asarray(values))})


@pytest.mark.parametrize(("shift", "complains"), [(0.0, False), (0.5, True)])
def test_chains_are_judged_by_their_r_hat(shift: float, complains: bool) -> None:
    """By the rank-normalised one of the means, which a shift of s of half of them puts at about (1 + s^2 / 4)^(1/2)."""
    values = np.random.default_rng(1).standard_normal((8, 250))
    values[::2] += shift
    found = diagnose(quantities(values))
    assert (found.worst, found.max_rhat) == ("lp", pytest.approx(math.sqrt(1 + shift**2 / 4), abs=0.01))
    assert any("R-hat of lp" in words for words in complaints(found, **LIMITS)) == complains


@pytest.mark.parametrize(("times", "complains"), [(1, False), (10, True)])
def test_draws_are_judged_by_what_they_are_worth(times: int, complains: bool) -> None:
    """Each repeated ten times, they are worth a tenth: the standard deviation of an estimated size is a tenth of it."""
    values = np.random.default_rng(2).standard_normal((8, 2000 // times)).repeat(times, 1)
    found = diagnose(quantities(values))
    assert found.min_effective_draws == pytest.approx(16_000 / times, rel=0.3)
    loose = LIMITS | {"max_rhat": 1.1, "min_effective_draws": 8_000}
    assert any("the draws are worth" in words for words in complaints(found, **loose)) == complains
    assert complaints(found, **loose | {"min_effective_draws": 0}) == []


@pytest.mark.parametrize("entries", [[-3.0], [0.2, 0.3, 0.5]])
def test_draws_that_never_change_are_said_to_be(entries: list[float]) -> None:
    """Of a quantity of several entries too, which differ from one another."""
    values = np.broadcast_to(np.array(entries), (4, 50, len(entries)))
    found = diagnose(xarray.Dataset({"lp": (("chain", "draw", "rank"), values)}))
    assert found == Diagnosis(None, None, None, False, {})
    assert complaints(found, **LIMITS) == ["nothing varies over the draws: no chain has moved"]


def test_too_few_draws_are_not_judged() -> None:
    found = diagnose(quantities([[1.0, 2.0, 3.0], [4.0, 5.0, 7.0]]))
    assert found == Diagnosis(None, None, None, True, {})
    assert complaints(found, **LIMITS) == []


def test_components_without_rows_are_counted() -> None:
    values = np.random.default_rng(3).standard_normal((4, 500))
    for mean, complains in ((0.4, False), (0.6, True)):
        found = diagnose(quantities(values - values.mean() + mean, "num_empty_components_k"))
        assert found.num_empty_components == {"num_empty_components_k": pytest.approx(mean)}
        words = "on average 0.6 components have no row (num_empty_components_k): take fewer"
        assert complaints(found, **LIMITS) == [words] * complains
