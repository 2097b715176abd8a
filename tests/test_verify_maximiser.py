"""Maximisers: true ones hold, on open sets and at boundaries; saddles, minima and kinks are told."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Laplace, MultivariateNormal, constraints

from mixproof.inference.verification import assert_maximiser, verify_maximiser
from tests.claims import SEED, failed, normals, tensor

DATA = normals(21, 2) @ tensor([[1.0, 0.5], [0.0, 0.3]]) + tensor([3.0, -2.0])
NORMAL_SET = (constraints.real, constraints.positive_definite)


def scatter(x: Tensor) -> Tensor:
    return (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)


def normal_likelihood(mean: Tensor, covariance: Tensor) -> Tensor:
    return MultivariateNormal(mean, covariance).log_prob(DATA).sum()


def laplace_likelihood(median: Tensor, scale: Tensor) -> Tensor:
    return Laplace(median, scale).log_prob(DATA).sum()


def absolute_error(x: Tensor, weights: Tensor | float = 1.0) -> Callable[[Tensor], Tensor]:
    return lambda m: -(weights * (x - m).abs()).sum()


COUNTS = tensor([3.0, 0.0, 5.0])
LINE = DATA[:, 0].sort().values
MEDIAN = DATA.median(0).values
SIMPLEX = {"constraint": constraints.simplex}
TRUE_MAXIMISERS: dict[str, tuple] = {
    "normal": ((DATA.mean(0), scatter(DATA)), normal_likelihood, {"constraint": NORMAL_SET}),
    "weights": (tensor([0.2, 0.5, 0.3]), lambda p: (tensor([2.0, 5, 3]) * p.log()).sum(), SIMPLEX),
    "weight of zero": (COUNTS / 8, lambda p: torch.special.xlogy(COUNTS, p).sum(), SIMPLEX),
    "vertex": (tensor([1.0, 0, 0]), lambda p: 2 * p[0] + p[1], SIMPLEX),
    "median": (LINE[10], absolute_error(LINE), {}),
    "left end of a flat top": (LINE[9], absolute_error(LINE[:20]), {}),
    "inside a flat top": ((LINE[9] + LINE[10]) / 2, absolute_error(LINE[:20]), {}),
    "rounded flat top": (tensor(2.5), absolute_error(tensor([1.0, 2, 3]), tensor([0.1, 0.2, 0.3])), {}),
    "weighted median": (tensor(2.0), absolute_error(tensor([1.0, 2, 3]), tensor([0.2, 0.2, 0.3])), {}),
    "Laplace": (
        (MEDIAN, (DATA - MEDIAN).abs().mean(0)),
        laplace_likelihood,
        {"constraint": (constraints.real, constraints.positive)},
    ),
    "mean of zero": (tensor(0.0), lambda m: -(torch.cat([LINE, -LINE]) - m).square().sum(), {}),
    "mean far from zero": (
        (1e6 + LINE / 1e3).mean(),
        lambda m: -(1e6 + LINE / 1e3 - m).square().sum(),
        {},
    ),
    "height of zero": (tensor(0.1) * 3, lambda m: -(m - 0.3).square(), {}),
    "ridge": (tensor([1.0, 2.0]), lambda m: -(m.sum() - 3).square(), {}),
}
FALSE_MAXIMISERS: dict[str, tuple] = {
    "n - 1 for n": ((DATA.mean(0), scatter(DATA) * 21 / 20), normal_likelihood, {"constraint": NORMAL_SET}),
    "relative 1e-8": ((DATA.mean(0) * (1 + 1e-8), scatter(DATA)), normal_likelihood, {"constraint": NORMAL_SET}),
    "minimum": ((DATA.mean(0), scatter(DATA)), lambda *a: -normal_likelihood(*a), {"constraint": NORMAL_SET}),
    "saddle": (torch.zeros(2).double(), lambda m: m[0] ** 2 - m[1] ** 2, {}),
    "lower of two hills": (
        tensor(0.0),
        lambda m: (-m.square() / 2).exp() + 2 * (-(m - 6).square() / 2).exp(),
        {},
    ),
    "permuted weights": (tensor([0.5, 0.2, 0.3]), lambda p: (tensor([2.0, 5, 3]) * p.log()).sum(), SIMPLEX),
    "unnormalised weights": (tensor([2.0, 5, 3]), lambda p: (tensor([2.0, 5, 3]) * p.log()).sum(), SIMPLEX),
    "nearly normalised": (tensor([0.2, 0.5, 0.3 + 1e-8]), lambda p: (tensor([2.0, 5, 3]) * p.log()).sum(), SIMPLEX),
    "wrong face": (tensor([0.5, 0.0, 0.5]), lambda p: torch.special.xlogy(COUNTS, p).sum(), SIMPLEX),
    "worst face": (tensor([0.0, 0.5, 0.5]), lambda p: torch.special.xlogy(COUNTS, p).sum(), SIMPLEX),
    "mean for median": (LINE.mean(), absolute_error(LINE), {}),
    "neighbour of the median": (LINE[11], absolute_error(LINE), {}),
    "median moved by 1e-9": (LINE[10] + 1e-9, absolute_error(LINE), {}),
    "scale about the median, n - 1": (
        (MEDIAN, (DATA - MEDIAN).abs().sum(0) / 20),
        laplace_likelihood,
        {"constraint": (constraints.real, constraints.positive)},
    ),
}


CORRELATION = tensor([[1.0, 0.5, 0.1], [0.5, 1.0, 0.3], [0.1, 0.3, 1.0]])
CLOUD = normals(9, 4)
LEVELS = tensor([1.0, 200.0, 0.03, 1.5])
FLAT_CLOUD = normals(8, 3)
BETWEEN = FLAT_CLOUD.sort(0).values[3:5]


def cholesky_likelihood(root: Tensor, scatter: Tensor = CORRELATION) -> Tensor:
    return -2 * root.diagonal().log().sum() - torch.trace(torch.cholesky_inverse(root) @ scatter)


def nearest(*target: float) -> Callable[[Tensor], Tensor]:
    return lambda v: -(v - tensor([*target])).square().sum()


def kinks(m: Tensor) -> Tensor:
    return -(LEVELS * (CLOUD - m).abs()).sum()


def flat_and_smooth(m: Tensor) -> Tensor:
    """Flat in the first two coordinates between data, smooth in the last."""
    return -(FLAT_CLOUD[:, :2] - m[:2]).abs().sum() - (FLAT_CLOUD[:, 2] - m[2]).square().sum()


def roof(m: Tensor) -> Tensor:
    """Two oblique ridges that cross at (1, 1)."""
    return -(100 * (m[0] - m[1]).abs() + (m.sum() - 2).abs())


def ridge_and_hill(m: Tensor) -> Tensor:
    """An oblique ridge with a smooth top at (1, 1)."""
    return -(m[0] - m[1]).abs() - (m.sum() - 2).square()


BOX = {"constraint": constraints.unit_interval}
FACTOR = {"constraint": constraints.lower_cholesky}
FLAT_TOP = torch.cat([BETWEEN[:, :2].mean(0), FLAT_CLOUD[:, 2].mean()[None]])
CORRELATION_FACTOR = {"constraint": constraints.corr_cholesky}
TRUE_MAXIMISERS |= {
    "correlation factor": (torch.linalg.cholesky(CORRELATION), cholesky_likelihood, CORRELATION_FACTOR),
    "Cholesky factor": (
        torch.linalg.cholesky(4 * CORRELATION),
        lambda r: cholesky_likelihood(r, 4 * CORRELATION),
        FACTOR,
    ),
    "corner and face of a box": (tensor([1.0, 0.0, 0.3]), nearest(2.0, -0.5, 0.3), BOX),
    "corner of a box": (tensor([1.0, 0.0]), nearest(1.0, -1e-9), BOX),
    "half-line": (tensor([0.0, 2.0]), nearest(-1.0, 2.0), {"constraint": constraints.nonnegative}),
    "all fair, at the edge": (
        tensor([0.0, 0.5, 1.0]),
        lambda p: (torch.special.xlogy(tensor([0.0, 2, 4]), p) + torch.special.xlogy(tensor([4.0, 2, 0]), 1 - p)).sum(),
        BOX,
    ),
    "projection onto the simplex": (tensor([0.5, 0.5, 0.0]), nearest(0.6, 0.6, -0.2), SIMPLEX),
    "rows, some at a face": (
        tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]]),
        lambda p: -(p - tensor([[0.6, 0.6, -0.2], [2.0, 0.0, -1.0], [0.2, 0.3, 0.5]])).square().sum(),
        SIMPLEX,
    ),
    "medians of unequal weights": (CLOUD.median(0).values, kinks, {}),
    "flat and smooth": (FLAT_TOP, flat_and_smooth, {}),
    "roof": (tensor([1.0, 1.0]), roof, {}),
    "ridge and hill": (tensor([1.0, 1.0]), ridge_and_hill, {}),
    "single precision": (
        torch.tensor([0.2, 0.5, 0.3]),
        lambda p: (torch.tensor([2.0, 5, 3]) * p.log()).sum(),
        SIMPLEX,
    ),
    "single precision at a kink": (
        CLOUD.float().median(0).values,
        lambda m: -(CLOUD.float() - m).abs().sum(),
        {},
    ),
}
ONE_UP = CLOUD.sort(0).values[5]
FALSE_MAXIMISERS |= {
    "correlation 1e-6": (
        torch.linalg.cholesky(CORRELATION + 1e-6 * (tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 0]]))),
        cholesky_likelihood,
        CORRELATION_FACTOR,
    ),
    "Cholesky factor 1e-6": (torch.linalg.cholesky(CORRELATION) * (1 + 1e-6), cholesky_likelihood, FACTOR),
    "covariance 1e-6": ((DATA.mean(0), scatter(DATA) * (1 + 1e-6)), normal_likelihood, {"constraint": NORMAL_SET}),
    "wrong corner": (tensor([0.0, 0.0, 0.3]), nearest(2.0, -0.5, 0.3), BOX),
    "face of a box, 1e-6": (tensor([1.0, 0.0, 0.3 + 3e-7]), nearest(2.0, -0.5, 0.3), BOX),
    "bound for a maximum 1e-6 away": (tensor([1.0, 0.0]), nearest(1 - 1e-6, -0.5), BOX),
    "interior for a bound": (tensor([1 - 1e-6, 0.0]), nearest(2.0, -0.5), BOX),
    "half-line 1e-6": (tensor([0.0, 2.0]), nearest(1e-6, 2.0), {"constraint": constraints.nonnegative}),
    "face of the simplex, 1e-6": (tensor([0.5 + 5e-7, 0.5 - 5e-7, 0.0]), nearest(0.6, 0.6, -0.2), SIMPLEX),
    "weight dropped that is 1e-6": (tensor([0.5, 0.5, 0.0]), nearest(0.5, 0.5, 1e-6), SIMPLEX),
    "weight of 1e-6 for none": (tensor([0.5, 0.5 - 1e-6, 1e-6]), nearest(0.6, 0.6, -0.2), SIMPLEX),
    **{
        f"median {i} one up": (torch.where(torch.arange(4) == i, ONE_UP, CLOUD.median(0).values), kinks, {})
        for i in range(4)
    },
    "flat and smooth, 1e-6": (FLAT_TOP * tensor([1, 1, 1 + 1e-6]), flat_and_smooth, {}),
    "off the flat top": (
        torch.where(torch.arange(3) == 1, FLAT_CLOUD.sort(0).values[5], FLAT_TOP),
        flat_and_smooth,
        {},
    ),
    "along the roof, 1e-6": (tensor([1 + 1e-6, 1 + 1e-6]), roof, {}),
    "along the ridge, 1e-6": (tensor([1 + 1e-6, 1 + 1e-6]), ridge_and_hill, {}),
    "single precision, 1 %": (
        torch.tensor([0.21, 0.49, 0.3]),
        lambda p: (torch.tensor([2.0, 5, 3]) * p.log()).sum(),
        SIMPLEX,
    ),
}


@pytest.mark.parametrize("name", TRUE_MAXIMISERS)
def test_true_maximisers_hold(name: str) -> None:
    claimed, objective, options = TRUE_MAXIMISERS[name]
    for seed in range(3):
        assert_maximiser(claimed, objective, **options, seed=seed)


@pytest.mark.parametrize("name", FALSE_MAXIMISERS)
def test_false_maximisers_are_refuted(name: str) -> None:
    claimed, objective, options = FALSE_MAXIMISERS[name]
    assert verify_maximiser(claimed, objective, **options, seed=SEED).verdict == "refuted"


def test_boundary_and_outside_are_said() -> None:
    claimed, objective, options = TRUE_MAXIMISERS["weight of zero"]
    assert "off the boundary" in str(assert_maximiser(claimed, objective, **options, seed=SEED))
    claimed, objective, options = FALSE_MAXIMISERS["weight dropped that is 1e-6"]
    assert "falls inward" in failed(verify_maximiser(claimed, objective, **options, seed=SEED))
    claimed, objective, options = FALSE_MAXIMISERS["unnormalised weights"]
    assert "outside its constraint" in str(verify_maximiser(claimed, objective, **options, seed=SEED))


def test_boundary_of_other_sets_is_undecided() -> None:
    target = tensor([1.0, -1.0]).diag()
    report = verify_maximiser(
        tensor([1.0, 0.0]).diag(),
        lambda s: -(s - target).square().sum(),
        constraint=constraints.positive_semidefinite,
        seed=SEED,
    )
    assert report.verdict == "undecided"


def test_oblique_kinks_are_told_by_their_directions() -> None:
    for name in ("roof", "ridge and hill", "medians of unequal weights"):
        claimed, objective, options = TRUE_MAXIMISERS[name]
        report = assert_maximiser(claimed, objective, **options, seed=SEED)
        assert "zero lies in the hull" in str(report)
    claimed, objective, options = FALSE_MAXIMISERS["along the roof, 1e-6"]
    assert "no ascent" in failed(verify_maximiser(claimed, objective, **options, seed=SEED))


def test_objective_without_a_value_leaves_the_claim_undecided() -> None:
    assert verify_maximiser(tensor(1.0), lambda m: m * torch.nan, seed=SEED).verdict == "undecided"


@pytest.mark.parametrize("claimed", [0.0, [0.0, 1.0]])
def test_claims_that_are_no_tensors_are_refused(claimed: Any) -> None:
    with pytest.raises(TypeError, match="claimed must hold tensors, not float"):
        verify_maximiser(claimed, lambda m: -(m**2), seed=SEED)


def test_verdict_has_no_units() -> None:
    for unit in (1e-6, 1e6):
        x = LINE * unit
        for factor in (1e-6, 1e6):
            assert_maximiser(x.mean(), lambda m, x=x, c=factor: -c * (x - m).square().sum(), seed=SEED)
            assert_maximiser(x.median(), lambda m, x=x, c=factor: -c * (x - m).abs().sum(), seed=SEED)
            moved = x.mean() + 1e-7 * unit
            wrong = verify_maximiser(moved, lambda m, x=x, c=factor: -c * (x - m).square().sum(), seed=SEED)
            assert "stationary" in failed(wrong)
