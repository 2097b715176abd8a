"""Newton's method arrives, leaves saddles, closes in on kinks, and says how far it knows the minimum."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixproof.inference.newton import descend

EPS = torch.finfo(torch.float64).eps


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rosenbrock(u: Tensor) -> Tensor:
    return (1 - u[0]) ** 2 + 100 * (u[1] - u[0] ** 2) ** 2


def test_it_finds_a_curved_valley_and_says_how_well() -> None:
    u, step = descend(rosenbrock, vector(-1.2, 1.0))
    torch.testing.assert_close(u, vector(1.0, 1.0), rtol=0, atol=2**10 * EPS)
    assert step.abs().max() <= 2**10 * EPS


def test_it_leaves_a_saddle() -> None:
    u, _ = descend(lambda u: (u[0] ** 2 - 1) ** 2 + u[1] ** 2, vector(1e-3, 0.5))
    torch.testing.assert_close(u.abs(), vector(1.0, 0.0), rtol=0, atol=2**10 * EPS)


@pytest.mark.parametrize("start", [vector(0.3, 0.1), vector(9.0, -4.0)])
def test_it_closes_in_on_a_kink_in_one_variable_and_a_minimum_in_the_other(start: Tensor) -> None:
    points = vector(-1.0, 2.0, 4.0, 5.0, 6.5)

    def laplace(u: Tensor) -> Tensor:
        """The negative log likelihood of Laplace rows: least at their median and the log of their mean deviation."""
        return (points - u[0]).abs().sum() / u[1].exp() + len(points) * u[1]

    u, step = descend(laplace, start)
    expected = vector(4.0, math.log((points - 4).abs().mean().item()))
    assert step.abs().max() <= 1e-6
    assert ((u - expected).abs() <= 2 * step.abs() + 2**10 * EPS).all()


def test_it_stops_far_away_where_there_is_no_minimum() -> None:
    u, step = descend(lambda u: u[0] + u[1] ** 2, vector(0.0, 1.0))
    assert u[0] < -30
    assert step.isinf().any()


def test_many_variables_go_without_curvatures() -> None:
    center = torch.linspace(-1, 1, 200, dtype=torch.float64)
    u, step = descend(lambda u: ((u - center) ** 2).sum(), torch.zeros(200, dtype=torch.float64))
    assert (u - center).abs().max() <= step.abs().max()
